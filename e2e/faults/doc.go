// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package faults has the tests that stop containerd, a shim or a VMM before each side
// effect of each verb, or let that fail, on a real node, and then look whether the error
// was right, whether a retry succeeds, and whether anything is left. docs/reliability.md
// tells what they promise and how to run them.
package faults
