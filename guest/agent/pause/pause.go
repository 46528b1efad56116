// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package pause is the process that holds the PID namespace which a pod's
// containers share: it is that namespace's PID 1, reaps what falls to it, and
// does nothing else.
//
// It is the agent's own binary under another name. Its work is done in this
// package's init, which runs before that of every package outside the standard
// library (Go initializes by import path, and this one imports nothing but it),
// so that a pod does not pay for the agent's start a second time.
package pause

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// name is argv[0] of the process, and what ps shows.
const name = "pod-pause"

// oomScore is that of CRI's pause containers.
const oomScore = "-998"

func init() {
	if len(os.Args) == 1 && os.Args[0] == name && os.Getpid() == 1 {
		run()
	}
}

// run never returns. Nobody but the VM's own PID 1 ends this process, by SIGKILL.
func run() {
	// An ignored SIGCHLD makes the kernel reap children by itself. The rest are
	// ignored because a container that sees this process may signal it.
	signal.Ignore(syscall.SIGCHLD, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT,
		syscall.SIGPIPE, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGALRM)
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte(oomScore), 0)
	for {
		_ = syscall.Pause()
	}
}

// Start starts a pause process in a new PID namespace and returns its pid, which
// the caller watches. self is the path of this binary, /proc/self/exe as a rule.
//
// With IDs it is the root of a new user namespace too, which owns the PID namespace, and
// a new network, IPC and UTS namespace.
func Start(self string, ids *IDs) (int, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return 0, fmt.Errorf("open %s for the pause process: %w", os.DevNull, err)
	}
	defer null.Close()
	pid, err := syscall.ForkExec(self, []string{name}, &syscall.ProcAttr{
		Dir:   "/",
		Files: []uintptr{null.Fd(), null.Fd(), null.Fd()},
		Sys:   attributes(ids),
	})
	if err != nil {
		return 0, fmt.Errorf("start the pause process: %w", err)
	}
	if ids != nil {
		// It has not the right to.
		_ = os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte(oomScore), 0)
	}
	return pid, nil
}

// IDs are the first user and group ID of a user namespace, as they are outside, and how
// many of each there are.
type IDs struct{ UID, UIDs, GID, GIDs int }

func attributes(ids *IDs) *syscall.SysProcAttr {
	sys := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID, Setsid: true}
	if ids == nil {
		return sys
	}
	sys.Cloneflags |= syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS
	sys.UidMappings = []syscall.SysProcIDMap{{HostID: ids.UID, Size: ids.UIDs}}
	sys.GidMappings = []syscall.SysProcIDMap{{HostID: ids.GID, Size: ids.GIDs}}
	sys.GidMappingsEnableSetgroups = true
	sys.Credential = &syscall.Credential{}
	return sys
}
