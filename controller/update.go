// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// resourcesKey is the extension in which CRI's UpdatePodSandboxResources passes
// what a pod is to have from now on.
const resourcesKey = "updated-resources"

// updatedResources is of that extension what concerns a VM; CRI's own type is internal to it.
type updatedResources struct {
	Resources *runtime.LinuxContainerResources
}

// Update resizes the sandbox's VM when the pod's resources have changed, up or
// down. Other fields of a sandbox mean nothing to a VM. If the guest
// cannot do without the memory the error is ErrFailedPrecondition, and if it does not
// give it back in time ErrUnavailable; the VM stays as large as it was.
func (c *Controller) Update(ctx context.Context, id string, info sandbox.Sandbox, fields ...string) error {
	ctx = withPod(ctx, id)
	p, err := c.get(id)
	if err != nil {
		return err
	}
	ext, ok := info.Extensions[resourcesKey]
	if !ok || !concernsExtensions(fields) {
		return nil
	}
	var res updatedResources
	if err := json.Unmarshal(ext.GetValue(), &res); err != nil {
		return fmt.Errorf("decode %s: %w: %w", resourcesKey, err, errdefs.ErrInvalidArgument)
	}
	return c.resize(ctx, p, func(rec *record) (sizing, vmm.Size, error) {
		s, err := rec.sizing().with(res.Resources)
		if err != nil {
			return s, vmm.Size{}, err
		}
		size, err := s.size(nil)
		// What is not said stays.
		if res.Resources.GetCpuQuota() <= 0 {
			size.VCPUs = rec.Size.VCPUs
		}
		if res.Resources.GetMemoryLimitInBytes() <= 0 {
			size.MemoryBytes = rec.Size.MemoryBytes
		}
		return s, size, err
	})
}

func concernsExtensions(fields []string) bool {
	return len(fields) == 0 || slices.ContainsFunc(fields, func(f string) bool {
		return f == "extensions" || f == "extensions."+resourcesKey || strings.HasPrefix(f, "extensions.")
	})
}

// fitContainers makes the VM as large as the pod's containers want it, and its memory
// or number of vCPUs smaller only if that is allowed.
func (c *Controller) fitContainers(ctx context.Context, id string, containers []limits, shrinkMemory, shrinkVCPUs bool) error {
	p, err := c.get(id)
	if err != nil {
		return err
	}
	return c.resize(ctx, p, func(rec *record) (sizing, vmm.Size, error) {
		s := rec.sizing()
		size, err := s.size(containers)
		if !shrinkMemory {
			size.MemoryBytes = max(size.MemoryBytes, rec.Size.MemoryBytes)
		}
		if !shrinkVCPUs {
			size.VCPUs = max(size.VCPUs, rec.Size.VCPUs)
		}
		return s, size, err
	})
}

// resize makes the VM as large as want says, which is given the record. After an
// error the VM is as large as before, or the error says that it is not.
func (c *Controller) resize(ctx context.Context, p *pod, want func(*record) (sizing, vmm.Size, error)) error {
	if err := lockChan(ctx, p.resizing); err != nil {
		return fmt.Errorf("resize sandbox %q: %w", p.id, err)
	}
	defer func() { <-p.resizing }()
	vm, err := p.machine()
	if err != nil {
		return err
	}
	rec := p.snapshot()
	s, size, err := want(&rec)
	if err != nil {
		return fmt.Errorf("resize sandbox %q: %w", p.id, err)
	}
	from := rec.Size
	if s.FixedMemory != "" && size.MemoryBytes != from.MemoryBytes {
		return fmt.Errorf("resize sandbox %q: %d bytes of memory: must be %d, as annotation %s = false fixes it: %w",
			p.id, size.MemoryBytes, from.MemoryBytes, s.FixedMemory, errdefs.ErrFailedPrecondition)
	}
	if size == from && !rec.Resizing {
		return p.keepSizing(ctx, s)
	}
	// Before anything changes: after a crash the record says that the VM's size is open.
	if err := p.update(ctx, failpoint.UpdateRecord, func(r *record) { r.Resizing = true }); err != nil {
		return err
	}
	// Once begun it is done, so that record and VM agree.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 4*c.cfg.HotPlugTimeout)
	defer cancel()
	reached, err := c.resizeVM(ctx, vm, from, size, rec.Resizing)
	undone := true
	if err != nil {
		undoErr := c.takeBack(ctx, vm, from, reached)
		undone = undoErr == nil
		err = fmt.Errorf("resize sandbox %q from %s to %s: %w", p.id, sizeText(from), sizeText(size),
			errors.Join(sentinel(err, errdefs.ErrUnavailable), undoErr))
		reached, s = from, rec.sizing()
	}
	saveErr := p.update(ctx, failpoint.UpdateDone, func(r *record) {
		r.Size, r.VM, r.Sizing, r.Resizing = reached, stateOf(vm), &s, !undone
	})
	if err = errors.Join(err, saveErr); err != nil {
		return err
	}
	log.G(ctx).WithFields(log.Fields{"from": sizeText(from), "to": sizeText(reached)}).Info("resized sandbox")
	return nil
}

// keepSizing records what decides the VM's size from now on.
func (p *pod) keepSizing(ctx context.Context, s sizing) error {
	if rec := p.snapshot(); rec.sizing() == s {
		return nil
	}
	return p.update(ctx, failpoint.UpdateSizing, func(r *record) { r.Sizing = &s })
}

// memoryKept is how much of the memory that a VM is to lose its guest may keep for
// good: its kernel has data of its own there, which cannot be moved.
const memoryKept = 32 << 20

// resizeVM first grows what is to grow and then shrinks what is to shrink. It
// returns the size that the VM has now. That may be a little more memory than was
// asked for, as a guest may keep some; more than memoryKept is an error. Unsure
// means that the VM need not be as large as from.
func (c *Controller) resizeVM(ctx context.Context, vm vmm.VM, from, to vmm.Size, unsure bool) (vmm.Size, error) {
	grown := larger(from, to)
	if grown != from || unsure {
		if err := failpoint.At(ctx, failpoint.UpdateGrow); err != nil {
			return from, err
		}
		if err := vm.Resize(ctx, grown); err != nil {
			return from, err
		}
		if err := failpoint.At(ctx, failpoint.UpdateGuestGrown); err != nil {
			return grown, err
		}
		if err := c.resizeGuest(ctx, vm, grown); err != nil {
			return grown, err
		}
	}
	if to == grown {
		return to, nil
	}
	// The guest lets go of vCPUs before they are taken away; memory it can let go only
	// when it is asked for. Asked for more than it can do without it would kill.
	if err := failpoint.At(ctx, failpoint.UpdateGuestShrinks); err != nil {
		return grown, err
	}
	if err := c.prepareShrink(ctx, vm, grown, to); err != nil {
		grown.VCPUs = to.VCPUs // some may be off line
		return grown, err
	}
	if err := failpoint.At(ctx, failpoint.UpdateShrink); err != nil {
		return to, err
	}
	err := vm.Resize(ctx, to)
	var kept *vmm.KeptError
	if errors.As(err, &kept) && kept.MemoryBytes <= to.MemoryBytes+memoryKept && kept.MemoryBytes <= grown.MemoryBytes {
		to.MemoryBytes = kept.MemoryBytes
		err = vm.Resize(ctx, to)
	}
	if err != nil {
		return to, err
	}
	if err := failpoint.At(ctx, failpoint.UpdateGuestShrunk); err != nil {
		return to, err
	}
	return to, c.resizeGuest(ctx, vm, to)
}

// takeBack makes a VM as large as it was, after a resize that has reached something else.
func (c *Controller) takeBack(ctx context.Context, vm vmm.VM, from, reached vmm.Size) error {
	if reached == from {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*c.cfg.HotPlugTimeout)
	defer cancel()
	err := failpoint.At(ctx, failpoint.UpdateTakeBack)
	if err == nil {
		err = vm.Resize(ctx, from)
	}
	if err == nil {
		err = c.resizeGuest(ctx, vm, from)
	}
	if err != nil {
		return fmt.Errorf("and the VM cannot be made as large as it was: %w", err)
	}
	return nil
}
