// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

const (
	maxProcs  = 1
	gcPercent = 10
)
