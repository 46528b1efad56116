// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package failpoint lets tests of whole nodes stop a process, or let it fail, between
// two side effects. A point stands before each side effect of each verb; points.go
// names them all, and a test in this package compares them with the code.
//
// # In production there are none
//
// Without the build tag "failpoints" At is an empty function that the compiler leaves
// out, with the check of its result. No configuration, environment or file reaches a
// point then: there is no code that would look. Only tests build with the tag, into a
// directory of their own (make faults, docs/reliability.md).
//
// # With the tag
//
// The variable DirVariable names a directory. The file Point.File in it arms a point
// and says what happens there, to the first who comes: the file is renamed to
// Point.Reached, and the point is an empty function again.
//
//   - Fail: At returns an error that wraps ErrInjected.
//   - Refuse: the same, and the error is an ErrResourceExhausted.
//   - Panic: At panics, and the process ends, with what is deferred on its way.
//   - Kill: the process is killed by SIGKILL.
//   - Hang: At waits until the file Point.Reached is removed, or until its context has
//     ended: then it returns why. Whoever armed the point may kill the VMM meanwhile,
//     the shim or containerd.
//
// containerd's pkg/failpoint was considered: its points are armed when they are made,
// it has no kill and no hang that ends, and it is there in every build.
package failpoint

import (
	"errors"
	"strings"
)

// Point names a place before a side effect, as "verb/effect".
type Point string

// DirVariable is the environment variable with the directory of armed points.
const DirVariable = "CLOUDHV_FAILPOINTS"

// What a file that arms a point may say.
const (
	Fail   = "error"
	Refuse = "refuse"
	Panic  = "panic"
	Kill   = "kill"
	Hang   = "hang"
)

// ErrInjected is what At returns where it was told to fail. It has no class, like most
// errors of an operating system.
var ErrInjected = errors.New("a test wants it to fail")

// reachedSuffix marks a point that somebody has come to.
const reachedSuffix = ".reached"

// File is the name of the file that arms the point.
func (p Point) File() string { return strings.ReplaceAll(string(p), "/", ".") }

// Reached is the name that the file gets when somebody comes to the point.
func (p Point) Reached() string { return p.File() + reachedSuffix }
