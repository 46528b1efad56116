// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"fmt"
	"sync"

	"github.com/containerd/errdefs"

	wirev1 "github.com/cloudhv/containerd-cloudhv/controller/shim/wire/v1"
)

// task is a container of the pod.
type task struct {
	svc    *service
	id     string
	bundle string
	init   *process
	stats  sampler

	mu       sync.Mutex
	execs    map[string]*process // nil entries are being made
	paused   bool
	oomKills uint64 // as far as it was told
	usage    layerUsage
	deleted  bool
}

// process finds a process of the task; execID "" is the first.
func (t *task) process(execID string) (*process, error) {
	if execID == "" {
		return t.init, nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.execs[execID]; p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("process %q of container %q: %w", execID, t.id, errdefs.ErrNotFound)
}

// processes are all of the task, the first one first.
func (t *task) processes() []*process {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := []*process{t.init}
	for _, p := range t.execs {
		if p != nil {
			out = append(out, p)
		}
	}
	return out
}

// reserve takes an exec ID, so that only one process is made under it.
func (t *task) reserve(execID string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.execs[execID]; ok {
		return fmt.Errorf("process %q of container %q: %w", execID, t.id, errdefs.ErrAlreadyExists)
	}
	if t.execs == nil {
		t.execs = make(map[string]*process)
	}
	t.execs[execID] = nil
	return nil
}

func (t *task) add(p *process) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.execs[p.execID] = p
}

func (t *task) remove(execID string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.execs, execID)
}

func (t *task) setPaused(paused bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.paused = paused
}

// noteOOM tells containerd of out-of-memory kills that it does not know yet.
func (t *task) noteOOM(kills uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if kills <= t.oomKills {
		return
	}
	t.oomKills = kills
	t.svc.events.publish(&wirev1.TaskOOM{ContainerId: t.id})
}

// status is what containerd calls the state of a process.
func (t *task) status(p *process, info processInfo) wirev1.Status {
	switch info.state {
	case stateCreated:
		return wirev1.Status_STATUS_CREATED
	case stateStopped:
		return wirev1.Status_STATUS_STOPPED
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.paused && p.execID == "" {
		return wirev1.Status_STATUS_PAUSED
	}
	return wirev1.Status_STATUS_RUNNING
}
