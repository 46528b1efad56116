// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package qemu runs VMs by QEMU: with KVM where that really works, by pure
// software emulation anywhere else.
package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// Name is the driver's name.
const Name = "qemu"

// DefaultBinary is looked up on PATH.
const DefaultBinary = "qemu-system-x86_64"

// undoLimit bounds what a failed start takes to undo.
const undoLimit = 10 * time.Second

// Driver is QEMU's.
type Driver struct {
	// Opens says why a VMM may not open a device that we can; nil if it may. It is set before
	// the first Probe.
	Opens func(device string) error

	binary string

	mu   sync.Mutex
	host vmm.Host // what the last successful Probe found
}

var _ vmm.Driver = (*Driver)(nil)

// New makes a driver of the QEMU binary, a path or a name on PATH; empty is
// DefaultBinary.
func New(binary string) *Driver {
	if binary == "" {
		binary = DefaultBinary
	}
	return &Driver{binary: binary}
}

// Name is "qemu".
func (d *Driver) Name() string { return Name }

// data is vmm.State.Data.
type data struct {
	Size         vmm.Size `json:"size"`
	Max          vmm.Size `json:"max"`
	ConsoleLimit int64    `json:"console_limit"`
	Base         int64    `json:"base_memory"`
	MemoryFile   string   `json:"memory_file,omitempty"`
	BuiltInNIC   bool     `json:"built_in_nic,omitempty"`
	Accelerator  string   `json:"accelerator,omitempty"`
	// ImageDisk is false for a VM that an earlier version started.
	ImageDisk bool `json:"image_disk,omitempty"`
}

const (
	// overhead is what QEMU needs beyond its guest's memory, in bytes, and codeBuffer what
	// software emulation may take for translated code: when that is full it begins anew.
	overhead   = 128 << 20
	codeBuffer = 512 << 20
)

// overheadOf is what a VM's process takes at most, by what runs its processors.
func overheadOf(accelerator string) int64 {
	if accelerator == vmm.AccelKVM {
		return overhead
	}
	return overhead + codeBuffer
}

// Boot starts QEMU and takes control of it.
func (d *Driver) Boot(ctx context.Context, cfg vmm.Config) (vmm.VM, error) {
	vm, err := d.start(ctx, cfg, nil)
	if err != nil {
		return nil, err
	}
	return vm, nil
}

// start starts QEMU, with the guest's RAM a copy of a snapshot's unless from is
// nil, and takes control of it.
func (d *Driver) start(ctx context.Context, cfg vmm.Config, from *vmm.Snapshot) (_ *machine, retErr error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("qemu: %w", err)
	}
	host, err := d.probed(ctx)
	if err != nil {
		return nil, err
	}
	own := data{
		Size: cfg.Size, Max: cfg.Max, ConsoleLimit: cfg.ConsoleLimit, Base: cfg.Size.MemoryBytes,
		MemoryFile: cfg.MemoryFile, BuiltInNIC: cfg.TAP != nil, Accelerator: host.Accelerator, ImageDisk: true,
	}
	vm, err := newVM(cfg.ID, cfg.Dir, cfg.CgroupPath, cfg.UID, own)
	if err != nil {
		return nil, err
	}
	vm.unplugged = true
	defer func() {
		if retErr != nil {
			undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoLimit)
			defer cancel()
			retErr = errors.Join(retErr, vm.Kill(undo), vm.Close())
		}
	}()
	if err := vm.MakeCgroup(ctx); err != nil {
		return nil, err
	}
	if err := failpoint.At(ctx, failpoint.VMMFiles); err != nil {
		return nil, err
	}
	seal, err := vm.spawn(ctx, host, cfg, from)
	if err != nil {
		return nil, err
	}
	if err = failpoint.At(ctx, failpoint.VMMControl); err == nil {
		err = vm.control(ctx)
	}
	// When the monitor answers all files have been opened that a VM begins with.
	seal()
	if err != nil {
		return nil, vm.Explain(err)
	}
	if from != nil {
		if err := failpoint.At(ctx, failpoint.VMMLoad); err != nil {
			return nil, err
		}
		if err := vm.load(ctx, from.Dir); err != nil {
			return nil, vm.Explain(err)
		}
	}
	return vm, failpoint.At(ctx, failpoint.VMMRuns)
}

// probed is what the last successful Probe found, or a new one's result.
func (d *Driver) probed(ctx context.Context) (vmm.Host, error) {
	d.mu.Lock()
	host := d.host
	d.mu.Unlock()
	if host.Binary != "" {
		return host, nil
	}
	return d.Probe(ctx)
}

// Attach takes up a VM that runs already.
func (d *Driver) Attach(ctx context.Context, state vmm.State) (_ vmm.VM, retErr error) {
	var own data
	if err := json.Unmarshal(state.Data, &own); err != nil {
		return nil, fmt.Errorf("qemu: state of VM %s: %w: %w", state.ID, err, errdefs.ErrInvalidArgument)
	}
	vm, err := newVM(state.ID, state.Dir, state.Cgroup, state.UID, own)
	if err != nil {
		return nil, err
	}
	if err := vm.Adopt(state.Identity()); err != nil {
		return nil, err
	}
	vm.imageDoubt = true
	if err := vm.openLogs(ctx); err != nil {
		return nil, errors.Join(err, vm.Close())
	}
	vm.Watch()
	err = vm.control(ctx)
	if err == nil {
		err = vm.findSlots(ctx)
	}
	if err != nil {
		return nil, errors.Join(vm.Explain(err), vm.Close())
	}
	return vm, nil
}
