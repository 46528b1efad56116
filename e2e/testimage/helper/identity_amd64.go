// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

const sysGetrandom = 318
