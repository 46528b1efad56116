// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmpool

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/cloudhv/containerd-cloudhv/vmpool/snapshot"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// ErrOff means that the pool has nothing to give, and nothing to tend.
var ErrOff = fmt.Errorf("the pool is off: %w", errdefs.ErrFailedPrecondition)

// Drain lets all ready VMs go and keeps none until Fill. It does not wait: see
// Await. It ends with the process.
func (p *Pool) Drain() {
	p.mu.Lock()
	p.drained, p.asked = true, nil
	p.notify()
	p.mu.Unlock()
	if p.ctx.Err() == nil {
		p.fit(nil) // Run may be making a snapshot
	}
}

// Fill undoes Drain, FillTo, and what is left of a pause after failures. It does
// not wait.
func (p *Pool) Fill() { p.fill(0) }

// FillTo is Fill, and makes n VMs ready, as if so many pods had come now: for as
// long as that is remembered they are made again when they are taken. More than the
// pool may have is ErrInvalidArgument.
func (p *Pool) FillTo(n int) error {
	if limit := p.limit(); n > limit {
		return fmt.Errorf("%d VMs: the pool may have %d, by its max (%d) and its memory (%d MiB, at %d MiB each): %w",
			n, limit, p.cfg.Demand.Max, p.cfg.MaxMemory>>20, p.cfg.VMMemory>>20, errdefs.ErrInvalidArgument)
	}
	p.fill(n)
	return nil
}

func (p *Pool) fill(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.drained = false
	p.asked = slices.Repeat([]time.Time{time.Now()}, n)
	p.failures, p.until, p.lastErr = 0, time.Time{}, nil
	p.notify()
	p.poke()
}

// Await waits until the pool is as done wants it, and returns how it is then. When
// ctx ends it returns how it was last, and why ctx has ended; after Close, ErrOff.
func (p *Pool) Await(ctx context.Context, done func(Status) bool) (Status, error) {
	for {
		p.mu.Lock()
		changed := p.changed
		p.mu.Unlock()
		s := p.Status()
		if done(s) {
			return s, nil
		}
		if s.Off {
			return s, ErrOff
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return s, context.Cause(ctx)
		case <-p.ctx.Done():
			return s, ErrOff
		}
	}
}

// notify tells whoever awaits something, under p.mu.
func (p *Pool) notify() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// Rebuild makes the base snapshot anew and returns its ID when VMs are restored from
// it; those that map the old one go on, and ready ones are replaced one by one. Of
// calls at the same time one makes it, which goes on when its caller leaves. After an
// error the old one is in use.
func (p *Pool) Rebuild(ctx context.Context) (string, error) {
	if p.cfg.Off || p.ctx.Err() != nil {
		return "", ErrOff
	}
	snap, err := p.cfg.Store.Rebuild(ctx, p.cfg.Inputs, func(ctx context.Context, dir string) (vmm.Snapshot, error) {
		snap, err := p.makeSnapshot(ctx, dir)
		if err != nil {
			failCounter.WithValues("snapshot").Inc()
		}
		return snap, err
	})
	if err != nil {
		return "", fmt.Errorf("rebuild the base snapshot: %w", err)
	}
	p.putInUse(snap)
	return snap.ID, nil
}

// makeSnapshot makes the base snapshot in dir.
func (p *Pool) makeSnapshot(ctx context.Context, dir string) (snap vmm.Snapshot, err error) {
	log.G(ctx).WithField("snapshot", p.key).Info("making the base snapshot")
	began := time.Now()
	err = step(ctx, "snapshot", func(ctx context.Context) error {
		snap, err = p.template(ctx, dir)
		return err
	})
	if err == nil {
		snapshotTimer.UpdateSince(began)
		log.G(ctx).WithField("snapshot", p.key).WithField("duration", time.Since(began)).Info("made the base snapshot")
	}
	return snap, err
}

// putInUse restores VMs from a snapshot that was just made or found.
func (p *Pool) putInUse(snap *snapshot.Snapshot) {
	p.mu.Lock()
	p.current, p.badRestores = snap.ID, 0
	p.failures, p.until, p.lastErr = 0, time.Time{}, nil
	p.notify()
	p.mu.Unlock()
	p.poke()
	p.collect()
}

// SnapshotInfo is a snapshot on disk.
type SnapshotInfo struct {
	snapshot.Info
	// Current is true for the one that VMs are restored from.
	Current bool
}

// Snapshots lists what is on disk, the current one first.
func (p *Pool) Snapshots() ([]SnapshotInfo, error) {
	if p.cfg.Off {
		return nil, nil
	}
	infos, err := p.cfg.Store.List()
	if err != nil {
		return nil, err
	}
	snap, peekErr := p.cfg.Store.Peek(p.key)
	list := make([]SnapshotInfo, 0, len(infos))
	for _, info := range infos {
		s := SnapshotInfo{Info: info, Current: peekErr == nil && !info.Damaged && info.ID == snap.ID}
		if s.Current {
			list = slices.Insert(list, 0, s)
			continue
		}
		list = append(list, s)
	}
	return list, nil
}

// PooledVM is a VM of the pool that no pod has.
type PooledVM struct {
	// ID and Dir are the VM's; Dir holds its logs.
	ID, Dir string
	// Ready is false while it is being made, also to be a snapshot's template.
	Ready bool
	// Snapshot is the ID of what it was restored from, empty for a template.
	Snapshot string
	// Made is when it was begun.
	Made time.Time
	Size vmm.Size
	// VM is nil as long as there is no VMM.
	VM *vmm.State
}

// List tells of the VMs that no pod has, in the order of their IDs.
func (p *Pool) List() []PooledVM {
	var list []PooledVM
	for _, rec := range p.records() {
		if rec.Owner != "" {
			continue
		}
		list = append(list, PooledVM{
			ID: rec.ID, Dir: p.dir(rec.ID), Ready: rec.Ready, Snapshot: rec.Key, Made: rec.Made, Size: p.cfg.Machine.Size, VM: rec.VM,
		})
	}
	return list
}
