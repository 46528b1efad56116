// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package task

import (
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/reap"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/stdio"
)

// state is where a process is in its life:
//
//	        create/exec      start          exit
//	new ───────▶ created ───────▶ running ───────▶ stopped
//	                │  │  start     ▲
//	                │  └─▶ starting ┘ (or stopped, if it fails)
//	                └─────────────────────────────▶ stopped
//	                        killed before its start
//
// Delete removes a process that is created or stopped. A container's first
// process has a pid when it is created, an added one when it is running.
type state int

const (
	stateNew state = iota
	stateCreated
	stateStarting
	stateRunning
	stateStopped
)

var stateNames = [...]string{"new", "created", "starting", "running", "stopped"}

func (s state) String() string { return stateNames[s] }

// may lists the states that can follow.
var may = map[state][]state{
	stateNew:      {stateCreated},
	stateCreated:  {stateStarting, stateRunning, stateStopped},
	stateStarting: {stateRunning, stateStopped},
	stateRunning:  {stateStopped},
	stateStopped:  {},
}

// exitLost is the status of a process that could not be started.
const exitLost = 255

// process is one process of a container.
type process struct {
	// execID is empty for the container's first process.
	execID string
	// spec is an added process's until it is started.
	spec specs.Process
	io   *stdio.IO
	// done is closed when the process has stopped or is gone.
	done chan struct{}

	mu  sync.Mutex
	st  state
	pid int
	// reaped is true once the pid may be another process's.
	reaped   bool
	exit     reap.Exit
	oomKills uint64
	// deleted is true after Delete; those who still wait learn that it is gone.
	deleted bool
}

func newProcess(execID string) *process {
	return &process{execID: execID, done: make(chan struct{})}
}

func (p *process) state() state {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.st
}

// to changes the state, or says why that cannot be.
func (p *process) to(next state) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.toLocked(next)
}

func (p *process) toLocked(next state) error {
	for _, s := range may[p.st] {
		if s == next && !p.deleted {
			p.st = next
			return nil
		}
	}
	return fmt.Errorf("process is %s and cannot become %s: %w", p.st, next, errdefs.ErrFailedPrecondition)
}

// born gives the process its pid and state. It may have been reaped already.
func (p *process) born(pid int, st state) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pid = pid
	_ = p.toLocked(st)
}

// lost marks the pid as no longer the process's.
func (p *process) lost() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reaped = true
}

// stopped records how the process ended and wakes those who wait. Only the first
// call counts.
func (p *process) stopped(e reap.Exit, oomKills uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.toLocked(stateStopped) != nil {
		return
	}
	p.reaped, p.exit, p.oomKills = true, e, oomKills
	close(p.done)
	if p.io != nil {
		p.io.Exited()
	}
}

// failed is stopped for a process that never ran.
func (p *process) failed() {
	p.stopped(reap.Exit{Status: exitLost, At: time.Now()}, 0)
}

// remove marks the process as deleted and closes its streams.
func (p *process) remove() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.removeLocked()
}

// removeUnlessActive is remove for a process that has not started, or has ended.
func (p *process) removeUnlessActive() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.st == stateStarting || p.st == stateRunning {
		return fmt.Errorf("cannot delete a process that is %s: %w", p.st, errdefs.ErrFailedPrecondition)
	}
	p.removeLocked()
	return nil
}

func (p *process) removeLocked() {
	if p.deleted {
		return
	}
	p.deleted = true
	if p.st != stateStopped {
		close(p.done)
	}
	if p.io != nil {
		p.io.Close()
	}
}

// alive is the pid of a process that has one and has not been reaped, else 0.
func (p *process) alive() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.reaped {
		return 0
	}
	return p.pid
}

// signal sends a signal. The pid cannot be another process's: it is reaped by
// this agent, which marks that under the same lock before it forgets the pid.
func (p *process) signal(sig unix.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.reaped:
		return fmt.Errorf("process already finished: %w", errdefs.ErrNotFound)
	case p.pid == 0:
		return fmt.Errorf("process not created: %w", errdefs.ErrFailedPrecondition)
	}
	err := unix.Kill(p.pid, sig)
	switch {
	case err == unix.ESRCH: //nolint:errorlint // a bare errno
		return fmt.Errorf("process already finished: %w", errdefs.ErrNotFound)
	case err == unix.EINVAL: //nolint:errorlint // a bare errno
		return fmt.Errorf("signal %d: %w", sig, errdefs.ErrInvalidArgument)
	case err != nil:
		return fmt.Errorf("signal process %d: %w", p.pid, err)
	}
	return nil
}

// snapshot is a consistent view of a process.
type snapshot struct {
	pid      int
	st       state
	exit     reap.Exit
	oomKills uint64
	deleted  bool
}

func (p *process) snapshot() snapshot {
	p.mu.Lock()
	defer p.mu.Unlock()
	return snapshot{pid: p.pid, st: p.st, exit: p.exit, oomKills: p.oomKills, deleted: p.deleted}
}
