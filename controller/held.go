// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/vmpool/process"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// vmProcess is what watching and ending a sandbox need of its VM: a vmm.VM, or
// a VMM that its driver has not taken up.
type vmProcess interface {
	State() vmm.State
	// Kill ends the VMM at once and waits for it.
	Kill(ctx context.Context) error
	// Close lets go of it without ending it.
	Close() error
	// Done is closed when the VMM has ended; Exit then tells about it.
	Done() <-chan struct{}
	Exit() vmm.Exit
}

var (
	_ vmProcess = (vmm.VM)(nil)
	_ vmProcess = (*heldVM)(nil)
)

// heldVM is a VMM of an earlier containerd, known by its identity alone.
type heldVM struct {
	state vmm.State
	proc  *process.Handle
}

// holdVM takes hold of the VMM that was recorded, or returns ErrNotFound if it
// has ended. Its pid alone proves nothing: start time and boot are compared.
func holdVM(state vmm.State) (*heldVM, error) {
	proc, err := state.Identity().Open()
	if err != nil {
		return nil, err
	}
	return &heldVM{state: state, proc: proc}, nil
}

func (h *heldVM) State() vmm.State { return h.state }

func (h *heldVM) Kill(ctx context.Context) error { return h.proc.Kill(ctx) }

// Close lets go of the process, after which Done is closed too.
func (h *heldVM) Close() error {
	h.proc.Close()
	return nil
}

func (h *heldVM) Done() <-chan struct{} { return h.proc.Done() }

// Exit knows nothing: an exit status is for the parent.
func (h *heldVM) Exit() vmm.Exit { return vmm.Exit{} }

// hold takes hold of the processes of a sandbox that was found. One that has
// ended is no error.
func (p *pod) hold() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.rec.Shim != nil {
		s, err := adoptShim(*p.rec.Shim)
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		p.shim = s
	}
	if p.rec.State == StateStopped {
		return nil
	}
	_, err := p.processLocked()
	return err
}

// process is the sandbox's VMM, or nil if there is none or it has ended. One
// that is recorded and of which nobody has hold is found by its identity.
func (p *pod) process() (vmProcess, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.processLocked()
}

func (p *pod) processLocked() (vmProcess, error) {
	switch {
	case p.vm != nil:
		return p.vm, nil
	case p.held != nil:
		return p.held, nil
	case p.rec.VM == nil:
		return nil, nil
	}
	h, err := holdVM(*p.rec.VM)
	if errdefs.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	p.held = h
	return h, nil
}

// isWatched is true if vm is still the sandbox's, and nobody ends it.
func (p *pod) isWatched(vm vmProcess) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ending != nil || isClosed(p.exited) {
		return false
	}
	return p.vm != nil && vm == vmProcess(p.vm) || p.held != nil && vm == vmProcess(p.held)
}
