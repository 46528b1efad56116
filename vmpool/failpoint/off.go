// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

//go:build !failpoints

package failpoint

import "context"

// Enabled is true in builds whose points can be armed.
const Enabled = false

// At does nothing in this build, and the compiler leaves it out.
func At(context.Context, Point) error { return nil }

// Env is what a process that is started needs in its environment: nothing.
func Env() []string { return nil }
