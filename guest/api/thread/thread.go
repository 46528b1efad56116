// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package thread runs what changes its thread for good: its namespaces, its IDs, what
// it may do.
package thread

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Run runs f on a thread that ends with it, and returns its error. That is not the
// process's first one: it would stay, and the kernel shows it as the process.
func Run(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// As long as this goroutine has the thread no other gets it.
			defer runtime.UnlockOSThread()
			done <- Run(f)
			return
		}
		// Never unlocked: nothing else may run on this thread.
		done <- f()
	}()
	return <-done
}
