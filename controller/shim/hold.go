// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"context"
	"slices"
	"time"
)

// A containerd that comes back asks for the state of each container. One that it
// finds stopped it deletes, and with that it gives up FIFOs that it has not opened
// yet: what the container wrote last would be lost. So an exit that nobody waited
// for is held back while output is unread: State says that the container runs,
// containerd opens the FIFOs and waits, and Wait answers when they are read.
const (
	// defaultTailLimit is for how long a Wait holds back an exit.
	defaultTailLimit = 5 * time.Second
	// stateLimit is for how long State does, from when it is first asked. It ends
	// what would last for ever if nobody reads and nobody waits.
	stateLimit = 30 * time.Second
)

// await returns when the exit may be told, or with ctx.
func (p *process) await(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	early := p.enlist(ctx)
	defer p.delist(ctx)
	select {
	case <-p.exited:
	case <-ctx.Done():
		return ctx.Err()
	}
	if !early && p.heldBack() {
		p.io.waitRead(ctx, p.svc.tailLimit)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	// Who has gone learns nothing.
	if err := ctx.Err(); err != nil {
		return err
	}
	p.told = true
	return nil
}

// enlist notes a Wait call, and reports false if it comes after the exit.
func (p *process) enlist(ctx context.Context) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state == stateStopped {
		return false
	}
	p.waits = append(p.waits, ctx)
	return true
}

func (p *process) delist(ctx context.Context) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.waits = slices.DeleteFunc(p.waits, func(w context.Context) bool { return w == ctx })
}

// shown is the process as State tells it.
func (p *process) shown() processInfo {
	info := p.info()
	if !p.heldBack() {
		return info
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.asked.IsZero() {
		p.asked = time.Now()
	}
	if time.Since(p.asked) >= stateLimit {
		return info
	}
	return processInfo{state: stateRunning, tried: info.tried, pid: info.pid}
}

// heldBack reports whether the process has ended and containerd is not to know
// yet. That is only for containers that have run, whose output a FIFO carries.
func (p *process) heldBack() bool {
	if p.execID != "" || p.io.read() {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state != stateStopped || !p.tried || p.told {
		return false
	}
	// A call whose connection is lost tells nobody.
	return !slices.ContainsFunc(p.waits, func(w context.Context) bool { return w.Err() == nil })
}
