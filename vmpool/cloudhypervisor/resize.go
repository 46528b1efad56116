// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package cloudhypervisor

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmproc"
)

const (
	// cpuLimit is how long a guest may take to let vCPUs go, and cpuEach how much longer
	// for each of them; cpuPause is how often it is looked.
	cpuLimit = 10 * time.Second
	cpuEach  = time.Second
	cpuPause = 20 * time.Millisecond
)

// Resize sets how many vCPUs there are, and how much memory is plugged.
func (vm *machine) Resize(ctx context.Context, size vmm.Size) error {
	vm.mu.Lock()
	own := vm.own
	vm.mu.Unlock()
	if err := vmm.CheckResize(size, vmm.Size{VCPUs: 1, MemoryBytes: own.Base}, own.Max); err != nil {
		return fmt.Errorf("cloud-hypervisor: %w", err)
	}
	unlock, err := vm.Lock(ctx, "size")
	if err != nil {
		return fmt.Errorf("resize: %w", err)
	}
	defer unlock()
	info, err := vm.info(ctx)
	if err != nil {
		return fmt.Errorf("resize: %w", err)
	}
	err = vm.Resized(ctx, size, func() error {
		if err := vm.resizeCPUs(ctx, info.Config.CPUs.Boot, size.VCPUs); err != nil {
			return fmt.Errorf("to %d vCPUs: %w", size.VCPUs, err)
		}
		return vm.resizeMemory(ctx, info, size.MemoryBytes)
	})
	if err != nil {
		return fmt.Errorf("resize: %w", err)
	}
	return nil
}

// resizeCPUs plugs vCPUs in, or out. The guest lets those go by itself, and the
// hypervisor refuses every change until it has.
func (vm *machine) resizeCPUs(ctx context.Context, have, want int) error {
	limit := cpuLimit + time.Duration(max(0, have-want))*cpuEach
	within, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("the guest does not let its vCPUs go: %w", errdefs.ErrUnavailable))
	defer cancel()
	// That a shrinking was accepted says only that the guest was asked; that it is
	// accepted again says that there is nothing left to do.
	accepted, enough := 0, 1
	if want < have {
		enough = 2
	}
	pause := time.NewTicker(cpuPause)
	defer pause.Stop()
	for {
		err := vm.put(within, "vm.resize", resizeVM{VCPUs: want})
		switch {
		case err == nil:
			accepted++
		case !isPending(err):
			return err
		}
		if accepted >= 1 {
			vm.mu.Lock()
			vm.own.Size.VCPUs = want
			vm.mu.Unlock()
		}
		if accepted >= enough {
			return nil
		}
		select {
		case <-pause.C:
		case <-within.Done():
			if err != nil {
				return fmt.Errorf("%w: %w", context.Cause(within), err)
			}
			return context.Cause(within)
		}
	}
}

// isPending tells whether the hypervisor waits for the guest to let go of vCPUs: it answers so to
// Error::VcpuPendingRemovedVcpu of its vmm/src/cpu.rs, in vmm/src/api/http/http_endpoint.rs.
func isPending(err error) bool {
	var answer *apiError
	return errors.As(err, &answer) && answer.Code == http.StatusTooManyRequests
}

// resizeMemory asks the guest to have more memory plugged, or less, which it waits for.
func (vm *machine) resizeMemory(ctx context.Context, info *vmInfo, want int64) error {
	z := info.zone()
	if z == nil {
		return fmt.Errorf("there is no memory zone %q: %w", zone, errdefs.ErrInternal)
	}
	if z.Size+z.Plugged != want {
		if err := vm.put(ctx, "vm.resize-zone", resizeZone{ID: zone, Bytes: want}); err != nil {
			return err
		}
	}
	vm.mu.Lock()
	vm.own.Size.MemoryBytes = want
	vm.mu.Unlock()
	has, err := vm.awaitShrink(ctx, want)
	if err != nil {
		return err
	}
	if has > want {
		return &vmm.KeptError{MemoryBytes: has, Wanted: want}
	}
	return nil
}

// zone is the guest's RAM.
func (i *vmInfo) zone() *zoneConfig {
	for k := range i.Config.Memory.Zones {
		if z := &i.Config.Memory.Zones[k]; z.ID == zone {
			return z
		}
	}
	return nil
}

// awaitShrink waits until the machine has no more than so many bytes, and returns how many
// it has. A guest's driver that meets a page in use tries again after 50 s, or at once
// when it is asked for something else.
func (vm *machine) awaitShrink(ctx context.Context, want int64) (int64, error) {
	return vmproc.AwaitShrink(ctx, want,
		func(ctx context.Context) (int64, error) {
			info, err := vm.info(ctx)
			if err != nil {
				return 0, err
			}
			return info.Memory, nil
		},
		func(ctx context.Context) error { return vm.hurry(ctx, want) })
}

// hurry asks the guest once more for what it was asked for. The hypervisor tells it of
// changes only, so there is one first, too small to plug anything.
func (vm *machine) hurry(ctx context.Context, want int64) error {
	if err := vm.put(ctx, "vm.resize-zone", resizeZone{ID: zone, Bytes: want + vmm.MemoryUnit}); err != nil {
		return err
	}
	return vm.put(ctx, "vm.resize-zone", resizeZone{ID: zone, Bytes: want})
}
