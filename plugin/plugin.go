// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package plugin registers.
package plugin
