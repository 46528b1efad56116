// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/controller/rootfs"
	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// State is where a sandbox is in its life.
//
//	          Create            Start                 VM is the pod's
//	(none) ───────────▶ created ──────▶ starting ─────────────────────▶ ready
//	                       │               │                              │
//	                       │ Stop          │ it fails, or Stop, or        │ Stop, or VM or shim dies,
//	                       │               │ containerd ends meanwhile    │ or it died while containerd was away
//	                       ▼               ▼                              ▼
//	                    stopped ◀────── stopping ◀────────────────────────┘
//	                       │
//	                       │ Shutdown, and at once after a failed Start
//	                       ▼
//	                    (none)
//
// Only ready is SANDBOX_READY. In stopping and stopped the shim may still live,
// to tell the exits of the containers, until Shutdown.
type State string

// States of a sandbox.
const (
	StateCreated  State = "created"
	StateStarting State = "starting"
	StateReady    State = "ready"
	StateStopping State = "stopping"
	StateStopped  State = "stopped"
)

// transitions lists where each state may lead.
var transitions = map[State][]State{
	StateCreated:  {StateStarting, StateStopping, StateStopped},
	StateStarting: {StateReady, StateStopping},
	StateReady:    {StateStopping},
	StateStopping: {StateStopped},
	StateStopped:  {},
}

func (s State) valid() bool {
	_, ok := transitions[s]
	return ok
}

// to checks a transition. Staying is always possible.
func (s State) to(next State) error {
	if s == next || slices.Contains(transitions[s], next) {
		return nil
	}
	return &TransitionError{From: s, To: next}
}

// TransitionError tells of a call that does not fit a sandbox's state. It
// is an ErrFailedPrecondition.
type TransitionError struct {
	From, To State
}

func (e *TransitionError) Error() string {
	return fmt.Sprintf("a sandbox that is %s cannot become %s", e.From, e.To)
}

// Unwrap makes it an ErrFailedPrecondition.
func (e *TransitionError) Unwrap() error {
	return errdefs.ErrFailedPrecondition
}

// pod is one sandbox.
type pod struct {
	id  string
	dir string

	// start is what Create read from the pod's configuration; nil after recovery.
	start *startConfig
	// started is closed when Start has returned, or will never be called.
	started chan struct{}
	// exited is closed when the VM is gone and its network with it.
	exited chan struct{}
	// resizing, disking and removing are held, by sending to them, by one caller at a time.
	resizing, disking, removing chan struct{}

	// mu guards what follows. Nothing is waited for under it but the record's
	// being written.
	mu sync.Mutex
	// rec is the record; change it by update.
	rec record
	// vm and shim are set while they are known to have been started.
	vm   vmm.VM
	shim *shim
	// held is the VMM as long as its driver has not taken it up again, and
	// pending why not.
	held    *heldVM
	pending string
	// cancelStart ends a Start under way; nil if there is none.
	cancelStart context.CancelCauseFunc
	// moving is closed when the processes have moved into the pod's cgroup, or cannot;
	// nil before that begins.
	moving chan struct{}
	// ending is the ending of the sandbox under way, or the last one.
	ending *ending
	// pins keep the images that are disks of the VM, by key.
	pins map[string]*rootfs.Image
	// plugs are the disks being plugged, by key.
	plugs map[string]*plug
	// removed is true when Shutdown has removed everything.
	removed bool
}

func newPod(dir string, rec record) *pod {
	return &pod{
		id:       rec.ID,
		dir:      dir,
		rec:      rec,
		started:  make(chan struct{}),
		exited:   make(chan struct{}),
		resizing: make(chan struct{}, 1),
		disking:  make(chan struct{}, 1),
		removing: make(chan struct{}, 1),
		pins:     map[string]*rootfs.Image{},
		plugs:    map[string]*plug{},
	}
}

// update changes the record under the lock and writes it; if it cannot be
// written the change is taken back. Point is where tests may let that fail.
func (p *pod) update(ctx context.Context, point failpoint.Point, change func(*record)) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.updateLocked(ctx, point, change)
}

func (p *pod) updateLocked(ctx context.Context, point failpoint.Point, change func(*record)) error {
	if p.removed {
		return fmt.Errorf("sandbox %q: %w", p.id, errdefs.ErrNotFound)
	}
	before := p.rec
	change(&p.rec)
	if err := before.State.to(p.rec.State); err != nil {
		p.rec = before
		return fmt.Errorf("sandbox %q: %w", p.id, err)
	}
	if err := p.save(ctx, point); err != nil {
		p.rec = before
		return fmt.Errorf("sandbox %q: %w: %w", p.id, err, errdefs.ErrInternal)
	}
	return nil
}

// save writes the record as it is, under the lock.
func (p *pod) save(ctx context.Context, point failpoint.Point) error {
	if err := failpoint.At(ctx, point); err != nil {
		return err
	}
	return p.rec.save(p.dir)
}

// snapshot copies the record.
func (p *pod) snapshot() record {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.rec
}

// machine gives the VM of a ready sandbox, or ErrUnavailable.
func (p *pod) machine() (vmm.VM, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.machineLocked()
}

func (p *pod) machineLocked() (vmm.VM, error) {
	if err := p.rec.ready(); err != nil {
		return nil, err
	}
	if p.vm == nil {
		return nil, fmt.Errorf("sandbox %q: its VM has not been taken up yet%s: %w", p.id, because(p.pending), errdefs.ErrUnavailable)
	}
	return p.vm, nil
}

// ready is nil for a ready sandbox, and else ErrUnavailable.
func (r *record) ready() error {
	if r.State == StateReady {
		return nil
	}
	return fmt.Errorf("sandbox %q is %s%s: %w", r.ID, r.State, because(r.Cause), errdefs.ErrUnavailable)
}

func because(cause string) string {
	if cause == "" {
		return ""
	}
	return " (" + cause + ")"
}

// file is the path of a file in the sandbox's directory.
func (p *pod) file(name string) string {
	return filepath.Join(p.dir, name)
}

// isClosed is true if ch has been closed.
func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

// lockChan takes a lock that is a channel, unless ctx ends first.
func lockChan(ctx context.Context, ch chan struct{}) error {
	select {
	case ch <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// makeDir makes the sandbox's directory, which must not be there yet.
func (p *pod) makeDir(ctx context.Context) error {
	if err := failpoint.At(ctx, failpoint.CreateDir); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(p.dir), 0o711); err != nil {
		return fmt.Errorf("make state directory: %w", err)
	}
	if err := os.Mkdir(p.dir, 0o700); err != nil {
		return fmt.Errorf("make sandbox directory: %w", err)
	}
	return nil
}

// now is the time as records hold it: no monotonic reading.
func now() time.Time {
	return time.Now().UTC().Round(0)
}
