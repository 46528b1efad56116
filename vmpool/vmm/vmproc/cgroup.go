// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmproc

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/log"

	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// cgroupLock keeps calls about the cgroup apart.
const cgroupLock = "cgroup"

// MakeCgroup makes the VM's cgroup, if it has one, with its limits.
func (vm *VM) MakeCgroup(ctx context.Context) error {
	if err := failpoint.At(ctx, failpoint.VMMCgroup); err != nil {
		return err
	}
	if err := vm.cgroup.Make(); err != nil {
		return err
	}
	if err := failpoint.At(ctx, failpoint.VMMLimits); err != nil {
		return err
	}
	if err := vm.cgroup.Limit(vm.limits(vm.size)); err != nil {
		return fmt.Errorf("%s: %w", vm.cfg.Driver, err)
	}
	return nil
}

// limits are those of a VM of a size.
func (vm *VM) limits(size vmm.Size) vmm.Limits {
	return vmm.LimitsFor(size, vm.cfg.Overhead, vm.cfg.Threads)
}

// Resized runs resize, which makes the VM as large as said. The cgroup's limits grow
// before the VM does, and shrink when it has.
func (vm *VM) Resized(ctx context.Context, size vmm.Size, resize func() error) error {
	vm.mu.Lock()
	was := vm.size
	vm.mu.Unlock()
	if err := vm.limit(ctx, larger(was, size)); err != nil {
		return err
	}
	if err := resize(); err != nil {
		return err
	}
	if err := vm.limit(ctx, size); err != nil {
		// The host has memory in use for the VM that it does not give back: the larger limit holds.
		log.G(ctx).WithError(err).WithField("vm", vm.cfg.ID).Warn("cannot lower the limits of a VM's cgroup")
	}
	return nil
}

// limit sets the limits of the VM's cgroup, whichever that is.
func (vm *VM) limit(ctx context.Context, size vmm.Size) error {
	unlock, err := vm.Lock(ctx, cgroupLock)
	if err != nil {
		return err
	}
	defer unlock()
	vm.mu.Lock()
	group, was := vm.cgroup, vm.size
	vm.mu.Unlock()
	if size == was {
		return nil
	}
	if err := group.Limit(vm.limits(size)); err != nil {
		return err
	}
	vm.mu.Lock()
	vm.size = size
	vm.mu.Unlock()
	return nil
}

func larger(a, b vmm.Size) vmm.Size {
	return vmm.Size{VCPUs: max(a.VCPUs, b.VCPUs), MemoryBytes: max(a.MemoryBytes, b.MemoryBytes)}
}

// SetCgroup moves the VMM into another group.
func (vm *VM) SetCgroup(ctx context.Context, path string) error {
	unlock, err := vm.Lock(ctx, cgroupLock)
	if err != nil {
		return err
	}
	defer unlock()
	vm.mu.Lock()
	old, group, limits := vm.cgroup, vm.group, vm.limits(vm.size)
	vm.mu.Unlock()
	if group == path {
		return nil
	}
	to := vmm.OpenCgroup(path)
	if err := to.Make(); err != nil {
		return fmt.Errorf("%s: VM %s: %w", vm.cfg.Driver, vm.cfg.ID, err)
	}
	err = to.Limit(limits)
	if err == nil {
		err = to.Add(vm.identity.Pid)
	}
	if err != nil {
		// It may be in some of the group's hierarchies already.
		return errors.Join(fmt.Errorf("%s: VM %s: %w", vm.cfg.Driver, vm.cfg.ID, err), old.Add(vm.identity.Pid), to.TryRemove())
	}
	vm.mu.Lock()
	vm.cgroup, vm.group = to, path
	vm.mu.Unlock()
	if err := old.Remove(ctx); err != nil {
		log.G(ctx).WithError(err).WithField("vm", vm.cfg.ID).Warn("cannot remove the cgroup that a VM has left")
	}
	return nil
}
