// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"errors"
	"os"
	"runtime"
	"runtime/debug"
	"strings"

	"golang.org/x/sys/unix"
)

// A shim's memory is paid for in every pod, and most of it is the Go runtime's:
// of some 2.5 MB with two containers 0.3 MB are live. Measured as private
// anonymous memory, in this order: idle, two containers started, after twenty
// execs, and throughput of output.
//
//	GOMAXPROCS  GOGC   idle    started  later   output
//	2           100    1.2 MB  2.4 MB   3.7 MB  200 MB/s
//	2            25    1.8     3.3      3.7     200
//	1           100    1.0     2.5      3.3     300
//	1            50    1.0     2.1      3.3     300
//	1            10    1.5     3.1      3.5     300
//
// A processor of Go's has caches of its own for each size of object, so one is
// cheaper than two, and the work is copying, which one does well. A first
// collection costs some 0.3 MB for good, so it is not to come before it has
// something to collect.
const (
	maxProcs  = "1"
	gcPercent = 50
)

// tune sets the process up, and begins it again if that takes it. GOMAXPROCS counts from the
// start only: lowered later, what the other processors have allocated stays.
//
// CAP_SYS_RESOURCE goes: with it the kernel lets a process write beyond a quota, and into what
// a file system reserves for root, and the files that this one writes are a pod's volumes.
func tune() error {
	debug.SetGCPercent(gcPercent)
	const name = "GOMAXPROCS"
	// What is dropped from a thread's bounding set its process lacks after exec.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	dropped, err := dropCapability(unix.CAP_SYS_RESOURCE)
	if err != nil {
		return err
	}
	if os.Getenv(name) == maxProcs && !dropped {
		return nil
	}
	env := []string{name + "=" + maxProcs}
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, name+"=") {
			env = append(env, e)
		}
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return unix.Exec(self, os.Args, env)
}

// dropCapability drops a capability from the thread's bounding set, and tells whether it was
// there. One that may drop none, as containerd was denied CAP_SETPCAP, keeps it.
func dropCapability(c uintptr) (dropped bool, _ error) {
	has, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, c, 0, 0, 0)
	if err != nil || has == 0 {
		return false, err
	}
	err = unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
	if errors.Is(err, unix.EPERM) {
		return false, nil
	}
	return err == nil, err
}
