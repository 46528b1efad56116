// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package cloudhypervisor runs VMs by Cloud Hypervisor, on KVM or on Hyper-V's
// hypervisor.
package cloudhypervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmproc"
)

// Name is the driver's name.
const Name = "cloudhypervisor"

// DefaultBinary is looked up on PATH.
const DefaultBinary = "cloud-hypervisor"

// undoLimit bounds what a failed start takes to undo.
const undoLimit = 10 * time.Second

// Driver is Cloud Hypervisor's.
type Driver struct {
	// Opens says why a VMM may not open a device that we can; nil if it may. It is set before
	// the first Probe.
	Opens func(device string) error

	binary string
	// accelerator finds out what the host has; tests have their own.
	accelerator func() (name, reason string, err error)

	mu   sync.Mutex
	host vmm.Host // what the last successful Probe found
}

var _ vmm.Driver = (*Driver)(nil)

// New makes a driver of the Cloud Hypervisor binary, a path or a name on PATH; empty
// is DefaultBinary.
func New(binary string) *Driver {
	if binary == "" {
		binary = DefaultBinary
	}
	d := &Driver{binary: binary}
	d.accelerator = func() (string, string, error) {
		return accelerator(vmm.Opens(vmm.UsableKVM, vmm.AccelKVM, d.Opens), vmm.Opens(vmm.UsableMSHV, vmm.AccelMSHV, d.Opens))
	}
	return d
}

// Name is "cloudhypervisor".
func (d *Driver) Name() string { return Name }

// data is vmm.State.Data.
type data struct {
	Size         vmm.Size `json:"size"`
	Max          vmm.Size `json:"max"`
	ConsoleLimit int64    `json:"console_limit"`
	Base         int64    `json:"base_memory"`
	MemoryFile   string   `json:"memory_file,omitempty"`
	BuiltInNIC   bool     `json:"built_in_nic,omitempty"`
	// RootFS and Disks are vmm.Config.RootFS and the directory of disks that are plugged
	// in, which is there if the hypervisor is confined.
	RootFS string `json:"rootfs,omitempty"`
	Disks  string `json:"disks,omitempty"`
}

const (
	// overhead is what the hypervisor needs beyond its guest's memory, in bytes.
	overhead = 128 << 20
	// maxThreads is how many threads it may have beside those of vCPUs: some for itself,
	// and for each device one a queue, of which a disk has one for each vCPU at most.
	maxThreads = 256
)

// Boot starts Cloud Hypervisor and takes control of it.
func (d *Driver) Boot(ctx context.Context, cfg vmm.Config) (vmm.VM, error) {
	vm, err := d.start(ctx, cfg, nil)
	if err != nil {
		return nil, err
	}
	return vm, nil
}

// Restore starts Cloud Hypervisor with a snapshot.
func (d *Driver) Restore(ctx context.Context, cfg vmm.Config, from vmm.Snapshot) (vmm.VM, error) {
	if from.Driver != Name || from.Layout != layout {
		return nil, fmt.Errorf("cloud-hypervisor: snapshot of driver %q and layout %q: %w", from.Driver, from.Layout, errdefs.ErrInvalidArgument)
	}
	if err := from.CheckTAP(cfg.TAP); err != nil {
		return nil, fmt.Errorf("cloud-hypervisor: %w", err)
	}
	cfg.Size, cfg.Max, cfg.MemoryFile = from.Size, from.Max, ""
	vm, err := d.start(ctx, cfg, &from)
	if err != nil {
		return nil, err
	}
	return vm, nil
}

// start starts the process, and returns when its guest runs.
func (d *Driver) start(ctx context.Context, cfg vmm.Config, from *vmm.Snapshot) (_ *machine, retErr error) {
	if err := check(cfg); err != nil {
		return nil, fmt.Errorf("cloud-hypervisor: %w", err)
	}
	host, err := d.probed(ctx)
	if err != nil {
		return nil, err
	}
	vm, err := newVM(cfg.ID, cfg.Dir, cfg.CgroupPath, cfg.UID, data{
		Size: cfg.Size, Max: cfg.Max, ConsoleLimit: cfg.ConsoleLimit, Base: cfg.Size.MemoryBytes,
		MemoryFile: cfg.MemoryFile, BuiltInNIC: cfg.TAP != nil, RootFS: cfg.RootFS, Disks: disksDir(cfg),
	})
	if err != nil {
		return nil, err
	}
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
	runs, stop := vm.events.expect(isStart(from != nil))
	defer stop()
	if err := failpoint.At(ctx, failpoint.VMMFiles); err != nil {
		return nil, err
	}
	seal, err := vm.spawn(ctx, host, cfg, from)
	if err != nil {
		return nil, err
	}
	if err = failpoint.At(ctx, failpoint.VMMControl); err == nil {
		err = vm.started(ctx, runs)
	}
	// It has its sockets, and makes no others.
	seal()
	if err != nil {
		return nil, vm.Explain(err)
	}
	return vm, failpoint.At(ctx, failpoint.VMMRuns)
}

// check is Config.Validate, and what is this hypervisor's own.
func check(cfg vmm.Config) error {
	err := cfg.Validate()
	if cfg.MemoryFile != "" && filepath.Base(cfg.MemoryFile) != memoryName {
		// A clone finds it by its name, beside the rest of the snapshot.
		err = errors.Join(err, fmt.Errorf("MemoryFile %q: want the name %q: %w", cfg.MemoryFile, memoryName, errdefs.ErrInvalidArgument))
	}
	return err
}

// isStart knows the event after which a guest runs.
func isStart(restored bool) func(event) bool {
	name := eventBooted
	if restored {
		name = eventResumed
	}
	return func(e event) bool { return e.Source == sourceVM && e.Name == name }
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
func (d *Driver) Attach(ctx context.Context, state vmm.State) (vmm.VM, error) {
	var own data
	if err := json.Unmarshal(state.Data, &own); err != nil {
		return nil, fmt.Errorf("cloud-hypervisor: state of VM %s: %w: %w", state.ID, err, errdefs.ErrInvalidArgument)
	}
	vm, err := newVM(state.ID, state.Dir, state.Cgroup, state.UID, own)
	if err != nil {
		return nil, err
	}
	if err := vm.Adopt(state.Identity()); err != nil {
		return nil, err
	}
	if err := vm.openPipes(); err != nil {
		return nil, errors.Join(err, vm.Close())
	}
	vm.Watch()
	err = vm.openConsole(ctx)
	if err == nil {
		err = vm.findDevices(ctx)
	}
	if err != nil {
		return nil, errors.Join(vm.Explain(err), vm.Close())
	}
	return vm, nil
}

// spawn starts the process, in its cgroup, with its socket made. The caller calls seal
// once the hypervisor has made its own.
func (vm *machine) spawn(ctx context.Context, host vmm.Host, cfg vmm.Config, from *vmm.Snapshot) (seal func(), _ error) {
	if err := vm.RemoveFiles(fileNames...); err != nil {
		return nil, fmt.Errorf("cloud-hypervisor: %w", err)
	}
	var files [3]*os.File // in the order of their descriptors; the last for what it prints
	var err error
	files[0], err = vmproc.Listen(vm.Path(apiSocket))
	for i, name := range []string{eventPipe, logPipe} {
		if err == nil {
			files[1+i], err = vmproc.OpenPipe(vm.Path(name), os.O_RDWR)
		}
	}
	defer func() {
		for _, f := range files {
			_ = f.Close() // nil is no accident
		}
	}()
	if err != nil {
		return nil, fmt.Errorf("cloud-hypervisor: %w", err)
	}
	if err := vm.openPipes(); err != nil {
		return nil, err
	}
	if err := prepare(cfg, from); err != nil {
		return nil, err
	}
	inherited := files[:2:2]
	if cfg.TAP != nil {
		inherited = append(inherited, cfg.TAP)
	}
	command, err := command(host, cfg, from)
	if err != nil {
		return nil, err
	}
	command.Files, command.Output = inherited, files[2]
	proc, err := vm.Start(ctx, command, host.Accelerator)
	if err != nil {
		return nil, err
	}
	return proc.Seal, nil
}

// prepare makes what the hypervisor finds in its working directory.
func prepare(cfg vmm.Config, from *vmm.Snapshot) error {
	if cfg.MemoryFile != "" {
		f, err := os.OpenFile(cfg.MemoryFile, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return fmt.Errorf("cloud-hypervisor: %w", err)
		}
		if err := errors.Join(f.Truncate(cfg.Size.MemoryBytes), f.Close()); err != nil {
			return fmt.Errorf("cloud-hypervisor: make the memory file: %w", err)
		}
	}
	return link(cfg, from)
}

// started waits until the guest runs, and opens its console.
func (vm *machine) started(ctx context.Context, runs <-chan event) error {
	select {
	case <-runs:
	case <-vm.Gone():
		return fmt.Errorf("cloud-hypervisor: the VM did not start: %w", errdefs.ErrUnavailable)
	case <-ctx.Done():
		return fmt.Errorf("cloud-hypervisor: start: %w", context.Cause(ctx))
	}
	if err := vm.RemoveFiles(links...); err != nil {
		return fmt.Errorf("cloud-hypervisor: %w", err)
	}
	if err := vm.closeOwn(); err != nil {
		return fmt.Errorf("cloud-hypervisor: %w", err)
	}
	return vm.openConsole(ctx)
}
