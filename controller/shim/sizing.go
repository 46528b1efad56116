// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	hostv1 "github.com/cloudhv/containerd-cloudhv/controller/hostapi/v1"
	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
)

// sizer has the pod's VM made as large as the limits of its containers want it. It
// knows the limits, and the plugin the rules.
type sizer struct {
	// turn is held, by sending to it, while the plugin is asked: one request after the
	// other, so that the last one has them all.
	turn chan struct{}

	mu     sync.Mutex
	limits map[string]*hostv1.Limits // of containers that are there or being created
}

func newSizer() *sizer {
	return &sizer{turn: make(chan struct{}, 1), limits: map[string]*hostv1.Limits{}}
}

// lock takes the turn, which the caller gives back by unlock.
func (z *sizer) lock(ctx context.Context) (unlock func(), _ error) {
	select {
	case z.turn <- struct{}{}:
		return func() { <-z.turn }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for another resize of the pod's VM: %w", context.Cause(ctx))
	}
}

// set notes a container's limits; nil forgets it.
func (z *sizer) set(id string, l *hostv1.Limits) {
	z.mu.Lock()
	defer z.mu.Unlock()
	if l == nil {
		delete(z.limits, id)
	} else {
		z.limits[id] = l
	}
}

// get gives a container's limits; one that is not known has none.
func (z *sizer) get(id string) *hostv1.Limits {
	z.mu.Lock()
	defer z.mu.Unlock()
	if l := z.limits[id]; l != nil {
		return l
	}
	return &hostv1.Limits{ContainerId: id}
}

// all are the limits of all containers, in the order of their IDs, and whether
// there is one among them that has any.
func (z *sizer) all() (all []*hostv1.Limits, limited bool) {
	z.mu.Lock()
	defer z.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(z.limits)) {
		l := z.limits[id]
		all = append(all, l)
		limited = limited || l.MemoryBytes > 0 || l.CpuQuota > 0
	}
	return all, limited
}

// limitsOf are the limits that resources state; for what they do not mention those
// of before go on.
func limitsOf(id string, res *specs.LinuxResources, before *hostv1.Limits) *hostv1.Limits {
	l := &hostv1.Limits{ContainerId: id, MemoryBytes: before.MemoryBytes, CpuQuota: before.CpuQuota, CpuPeriod: before.CpuPeriod}
	if res == nil {
		return l
	}
	if m := res.Memory; m != nil && m.Limit != nil {
		l.MemoryBytes = max(*m.Limit, 0)
	}
	if c := res.CPU; c != nil {
		if c.Quota != nil {
			l.CpuQuota = max(*c.Quota, 0)
		}
		if c.Period != nil {
			l.CpuPeriod = *c.Period
		}
	}
	return l
}

// growVM makes the VM large enough for the containers there are, those that are
// being created too. Without any limit it is.
func (s *service) growVM(ctx context.Context) error {
	unlock, err := s.sizer.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	if _, limited := s.sizer.all(); !limited {
		return nil
	}
	if err := failpoint.At(ctx, failpoint.TaskCreateGrow); err != nil {
		return err
	}
	return s.askResize(ctx, &hostv1.ResizeRequest{})
}

// resizeFor makes the VM as large as the containers want it when one of them gets
// other limits, and then does update. If that fails the VM and the limits are as
// before. What the update leaves alone is not made smaller for it.
func (s *service) resizeFor(ctx context.Context, id string, res *specs.LinuxResources, update func() error) error {
	unlock, err := s.sizer.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	defer func() {
		if _, err := s.task(id); err != nil {
			s.sizer.set(id, nil) // it has been deleted meanwhile
		}
	}()
	before := s.sizer.get(id)
	now := limitsOf(id, res, before)
	req := &hostv1.ResizeRequest{
		ShrinkMemory: now.MemoryBytes != before.MemoryBytes,
		ShrinkVcpus:  now.CpuQuota != before.CpuQuota || now.CpuPeriod != before.CpuPeriod && now.CpuQuota > 0,
	}
	if !req.ShrinkMemory && !req.ShrinkVcpus {
		return update()
	}
	s.sizer.set(id, now)
	if err := s.askResize(ctx, req); err != nil {
		s.sizer.set(id, before)
		return err
	}
	if err = update(); err == nil {
		return nil
	}
	s.sizer.set(id, before)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoLimit)
	defer cancel()
	if undoErr := s.askResize(ctx, req); undoErr != nil {
		log.G(ctx).WithError(undoErr).WithField("container", id).Warn("the VM is not as large as before an update that failed")
	}
	return err
}

// askResize asks the plugin for a VM of the size that all containers want.
func (s *service) askResize(ctx context.Context, req *hostv1.ResizeRequest) error {
	req.SandboxId = s.cfg.SandboxID
	req.Containers, _ = s.sizer.all()
	err := s.askHost(ctx, func(ctx context.Context, host hostv1.HostService) error {
		_, err := host.Resize(ctx, req)
		return err
	})
	if err != nil {
		return fmt.Errorf("make the pod's VM as large as its containers want it: %w", err)
	}
	return nil
}

// askHost asks the plugin for something, and waits for containerd while it is away.
func (s *service) askHost(ctx context.Context, ask func(context.Context, hostv1.HostService) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// A lost VM needs nothing any more.
	go func() {
		select {
		case <-s.guest.gone:
			cancel()
		case <-ctx.Done():
		}
	}()
	err := s.daemon.retry(ctx, func(ctx context.Context, client *ttrpc.Client) error {
		return ask(ctx, hostv1.NewHostClient(client))
	})
	switch {
	case s.guest.lost():
		return errVMLost
	case err != nil && errdefs.IsNotImplemented(err):
		return fmt.Errorf("containerd runs without the cloudhv plugin: %w", errdefs.ErrUnavailable)
	}
	return err
}
