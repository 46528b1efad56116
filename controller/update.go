// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// resourcesKey is the extension in which CRI's UpdatePodSandboxResources passes
// what a pod is to have from now on.
const resourcesKey = "updated-resources"

// updatedResources is that extension; CRI's own type is internal to it.
type updatedResources struct {
	Overhead  *runtime.LinuxContainerResources
	Resources *runtime.LinuxContainerResources
}

// Update resizes the sandbox's VM when the pod's resources have changed, up or
// down. Other fields of a sandbox mean nothing to a VM. If the guest
// does not give back memory in time the error is ErrUnavailable and the VM stays
// as large as it is.
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
	size, err := podSize(c.cfg, overrides{}, res.Resources, res.Overhead)
	if err != nil {
		return fmt.Errorf("resize sandbox %q: %w", id, err)
	}
	return c.resize(ctx, p, size, res.Resources)
}

func concernsExtensions(fields []string) bool {
	return len(fields) == 0 || slices.ContainsFunc(fields, func(f string) bool {
		return f == "extensions" || f == "extensions."+resourcesKey || strings.HasPrefix(f, "extensions.")
	})
}

// resize makes the VM as large as said, where the resources state a limit.
func (c *Controller) resize(ctx context.Context, p *pod, size vmm.Size, res *runtime.LinuxContainerResources) error {
	if err := lockChan(ctx, p.resizing); err != nil {
		return fmt.Errorf("resize sandbox %q: %w", p.id, err)
	}
	defer func() { <-p.resizing }()
	vm, err := p.machine()
	if err != nil {
		return err
	}
	from := p.snapshot().Size
	if res.GetCpuQuota() <= 0 {
		size.VCPUs = from.VCPUs
	}
	if res.GetMemoryLimitInBytes() <= 0 {
		size.MemoryBytes = from.MemoryBytes
	}
	if size == from {
		return nil
	}
	// Once begun it is done, so that record and VM agree.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*c.cfg.HotPlugTimeout)
	defer cancel()
	reached, err := c.resizeVM(ctx, vm, from, size)
	if saveErr := p.update(func(r *record) { r.Size, r.VM = reached, stateOf(vm) }); saveErr != nil && err == nil {
		err = saveErr
	}
	if err != nil {
		return fmt.Errorf("resize sandbox %q from %s to %s: %w", p.id, sizeText(from), sizeText(size),
			sentinel(err, errdefs.ErrUnavailable))
	}
	log.G(ctx).WithFields(log.Fields{"from": sizeText(from), "to": sizeText(size)}).Info("resized sandbox")
	return nil
}

// resizeVM first grows what is to grow and then shrinks what is to shrink, and
// returns the size that was reached.
func (c *Controller) resizeVM(ctx context.Context, vm vmm.VM, from, to vmm.Size) (vmm.Size, error) {
	reached := from
	grown := vmm.Size{VCPUs: max(from.VCPUs, to.VCPUs), MemoryBytes: max(from.MemoryBytes, to.MemoryBytes)}
	if grown != from {
		if err := vm.Resize(ctx, grown); err != nil {
			return reached, err
		}
		if err := c.resizeGuest(ctx, vm, grown); err != nil {
			return reached, err
		}
		reached = grown
	}
	if to == grown {
		return reached, nil
	}
	// The guest lets go of vCPUs before they are taken away; memory it can let
	// go only when it is asked for.
	if err := c.resizeGuest(ctx, vm, vmm.Size{VCPUs: to.VCPUs}); err != nil {
		return reached, err
	}
	reached.VCPUs = to.VCPUs
	if err := vm.Resize(ctx, to); err != nil {
		return reached, err
	}
	if err := c.resizeGuest(ctx, vm, to); err != nil {
		return reached, fmt.Errorf("the guest keeps memory in use: %w", err)
	}
	return to, nil
}

func sizeText(s vmm.Size) string {
	return fmt.Sprintf("%d vCPUs and %d MiB", s.VCPUs, s.MemoryBytes>>20)
}
