// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

const (
	// groupLink, in a sandbox's directory, points to its VMM's cgroup, for when the record
	// cannot be read.
	groupLink = "cgroup"
	// maxGroup bounds what such a link may say, in bytes.
	maxGroup = 4096
	// restCgroup, below the configured parent, is the parent group of shims whose pod has
	// ended: the pod's own group is somebody else's to remove.
	restCgroup = "ended"
)

// shimLimits bound what a shim uses of the host, whatever its guest does: by the bounds of
// what it reads of the guest, all of them met at once, it takes half of that memory. Pages
// of a volume's files come to it, which the kernel takes back.
var shimLimits = vmm.Limits{MemoryBytes: 512 << 20, VCPUs: 1, Threads: 512}

// shimGroup is the cgroup of a sandbox's shim, beside its VMM's, whose limits are not
// for it; empty for none.
func shimGroup(vmmGroup string) string {
	if vmmGroup == "" {
		return ""
	}
	return vmmGroup + "-shim"
}

// restGroup is the cgroup of a sandbox's shim from the sandbox's end to its removal.
func (c *Controller) restGroup(id string) string {
	return path.Join("/", c.cfg.CgroupParent, restCgroup, id)
}

// linkGroup writes down which cgroup the sandbox's VMM is to have.
func (p *pod) linkGroup(ctx context.Context) error {
	if err := failpoint.At(ctx, failpoint.CreateGroupLink); err != nil {
		return err
	}
	if p.rec.Cgroup == "" {
		return nil
	}
	return os.Symlink(p.rec.Cgroup, p.file(groupLink))
}

// linkedGroup reads it, in the directory of a sandbox whose record cannot be read.
// Empty means that there is none of ours.
func linkedGroup(dir string) string {
	group, err := os.Readlink(filepath.Join(dir, groupLink))
	if err != nil || len(group) > maxGroup || path.Base(group) != leafName(filepath.Base(dir)) || path.Clean(group) != group {
		return ""
	}
	return group
}

// enterPod begins to move the processes of a ready sandbox into the pod's cgroup, which
// takes milliseconds that nobody waits for but the sandbox's end and its metrics.
// What they have used before stays with the groups that they were in.
func (c *Controller) enterPod(ctx context.Context, p *pod) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.rec.Cgroup == "" || p.vm == nil || p.shim == nil || p.ending != nil || p.moving != nil {
		return
	}
	vm, shim, done := p.vm, p.shim, make(chan struct{})
	p.moving = done
	ctx = untraced(ctx)
	go func() {
		defer close(done)
		ctx, cancel := c.cleanup(ctx)
		defer cancel()
		began := time.Now()
		if err := p.move(ctx, vm, shim); err != nil {
			log.G(ctx).WithError(err).Warn("a sandbox's processes are not in its pod's cgroup, whose limits do not bind them")
			return
		}
		log.G(ctx).WithField("duration", time.Since(began)).Debug("moved a sandbox's processes into its pod's cgroup")
	}()
}

// move moves both processes and records where the VMM is now.
func (p *pod) move(ctx context.Context, vm vmm.VM, s *shim) error {
	group := p.snapshot().Cgroup
	if err := failpoint.At(ctx, failpoint.MoveVMM); err != nil {
		return err
	}
	if err := vm.SetCgroup(ctx, group); err != nil {
		return err
	}
	if err := failpoint.At(ctx, failpoint.MoveShim); err != nil {
		return err
	}
	if err := putInto(shimGroup(group), s.id.Pid); err != nil {
		return fmt.Errorf("shim: %w", err)
	}
	return p.update(ctx, failpoint.MoveRecord, func(r *record) { r.VM = stateOf(vm) })
}

// putInto moves a shim into a group, which it makes and limits.
func putInto(group string, pid int) error {
	g := vmm.OpenCgroup(group)
	if err := errors.Join(g.Make(), g.Limit(shimLimits)); err != nil {
		return err
	}
	return g.Add(pid)
}

// awaitMove waits for a move that has begun. None begins when the sandbox ends.
func (p *pod) awaitMove(ctx context.Context) {
	p.mu.Lock()
	moving := p.moving
	p.mu.Unlock()
	if moving == nil {
		return
	}
	select {
	case <-moving:
	case <-ctx.Done():
	}
}

// shimLeaves takes a sandbox's shim out of its pod's cgroup, where it goes on elsewhere,
// while the VM ends: the kernel waits some 10 ms for RCU. The channel tells whether
// none is left there.
func (c *Controller) shimLeaves(ctx context.Context, p *pod, group string) <-chan bool {
	left := make(chan bool, 1)
	p.mu.Lock()
	s := p.shim
	p.mu.Unlock()
	if s == nil || isClosed(s.done()) || !vmm.OpenCgroup(shimGroup(group)).Exists() {
		left <- true
		return left
	}
	go func() {
		err := failpoint.At(ctx, failpoint.EndShimLeaves)
		if err == nil {
			err = putInto(c.restGroup(p.id), s.id.Pid)
		}
		if err == nil || isClosed(s.done()) {
			left <- true
			return
		}
		log.G(ctx).WithError(err).Warn("the shim stays in its pod's cgroup until the sandbox is removed")
		left <- false
	}()
	return left
}

// leavePod removes a sandbox's groups from its pod's cgroup: the VMM has ended, and the
// shim has left if left says so. It would be killed otherwise.
func leavePod(ctx context.Context, group string, left bool) error {
	if err := failpoint.At(ctx, failpoint.EndGroups); err != nil {
		return err
	}
	err := vmm.OpenCgroup(group).Remove(ctx)
	if shims := vmm.OpenCgroup(shimGroup(group)); left && shims.Exists() {
		err = errors.Join(err, shims.Remove(ctx))
	}
	return err
}

// removeShimGroups removes the groups that a shim was in which has ended.
func (c *Controller) removeShimGroups(ctx context.Context, id, vmmGroup string) error {
	if vmmGroup == "" {
		return nil
	}
	return errors.Join(vmm.OpenCgroup(shimGroup(vmmGroup)).Remove(ctx), vmm.OpenCgroup(c.restGroup(id)).Remove(ctx))
}

// sweepGroups removes the groups of shims that have ended and that no sandbox claims.
func (c *Controller) sweepGroups(ctx context.Context) {
	if !c.cfg.Cgroup {
		return
	}
	for _, name := range vmm.OpenCgroup(c.restGroup("")).Children() {
		if _, err := c.get(name); !errdefs.IsNotFound(err) {
			continue
		}
		if err := vmm.OpenCgroup(c.restGroup(name)).TryRemove(); err != nil {
			log.G(ctx).WithError(err).WithField("cgroup", c.restGroup(name)).Warn("cannot remove a cgroup that nobody claims")
		}
	}
}
