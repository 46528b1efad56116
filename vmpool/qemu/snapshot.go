// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// A snapshot is QEMU's migration stream without the RAM, which stays in the
// file that the template had it in (capability x-ignore-shared).
const (
	memoryName = "memory"
	stateName  = "state"
)

// saveAgain is how often to ask how the saving goes, which takes some 10 ms.
const saveAgain = 2 * time.Millisecond

func memoryPath(dir string) string { return filepath.Join(dir, memoryName) }

// ignoreShared leaves RAM that lives in a file out of the stream.
var ignoreShared = object{"capabilities": []object{{"capability": "x-ignore-shared", "state": true}}}

// Restore starts QEMU with a snapshot's RAM and loads the snapshot's state.
func (d *Driver) Restore(ctx context.Context, cfg vmm.Config, from vmm.Snapshot) (vmm.VM, error) {
	if from.Driver != Name {
		return nil, fmt.Errorf("qemu: snapshot of driver %q: %w", from.Driver, errdefs.ErrInvalidArgument)
	}
	if err := from.CheckTAP(cfg.TAP); err != nil {
		return nil, fmt.Errorf("qemu: %w", err)
	}
	cfg.Size, cfg.Max, cfg.MemoryFile = from.Size, from.Max, ""
	vm, err := d.start(ctx, cfg, &from)
	if err != nil {
		return nil, err
	}
	return vm, nil
}

// load loads a snapshot's state and returns when the guest runs.
func (vm *machine) load(ctx context.Context, dir string) error {
	state, err := os.Open(filepath.Join(dir, stateName))
	if err != nil {
		return fmt.Errorf("qemu: restore: %w", err)
	}
	defer state.Close() //nolint:errcheck // only read
	// A state that cannot be loaded ends QEMU.
	runs, stop, err := vm.expect(ctx, func(e event) bool { return e.Name == "RESUME" })
	if err != nil {
		return err
	}
	defer stop()
	if err := vm.call(ctx, "migrate-set-capabilities", ignoreShared, nil); err != nil {
		return fmt.Errorf("qemu: restore: %w", err)
	}
	if err := vm.call(ctx, "getfd", object{"fdname": stateName}, nil, state); err != nil {
		return fmt.Errorf("qemu: restore: %w", err)
	}
	if err := vm.call(ctx, "migrate-incoming", object{"uri": "fd:" + stateName}, nil); err != nil {
		return fmt.Errorf("qemu: restore: %w", err)
	}
	select {
	case <-runs:
		return nil
	case <-vm.Gone():
		return fmt.Errorf("qemu: restore: the state was not loaded: %w", errdefs.ErrUnavailable)
	case <-ctx.Done():
		return fmt.Errorf("qemu: restore: %w", context.Cause(ctx))
	}
}

// Snapshot saves the state beside the memory file.
func (vm *machine) Snapshot(ctx context.Context) (_ vmm.Snapshot, retErr error) {
	vm.mu.Lock()
	own := vm.own
	vm.mu.Unlock()
	if filepath.Base(own.MemoryFile) != memoryName {
		return vmm.Snapshot{}, fmt.Errorf("qemu: snapshot of VM %s: memory file %q: boot it with one named %q: %w",
			vm.ID(), own.MemoryFile, memoryName, errdefs.ErrFailedPrecondition)
	}
	var status struct {
		Running bool `json:"running"`
	}
	if err := vm.call(ctx, "query-status", nil, &status); err != nil {
		return vmm.Snapshot{}, err
	}
	if status.Running {
		return vmm.Snapshot{}, fmt.Errorf("qemu: snapshot of VM %s: it is not paused: %w", vm.ID(), errdefs.ErrFailedPrecondition)
	}
	dir := filepath.Dir(own.MemoryFile)
	if err := vm.save(ctx, filepath.Join(dir, stateName)); err != nil {
		return vmm.Snapshot{}, fmt.Errorf("qemu: snapshot of VM %s: %w", vm.ID(), err)
	}
	size := vmm.Size{VCPUs: own.Size.VCPUs, MemoryBytes: own.Base}
	return vmm.Snapshot{Driver: Name, Dir: dir, Size: size, Max: own.Max, BuiltInNIC: own.BuiltInNIC}, nil
}

// save writes the migration stream to path.
func (vm *machine) save(ctx context.Context, path string) (retErr error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		retErr = errors.Join(retErr, f.Close())
		if retErr != nil {
			_ = os.Remove(path)
		}
	}()
	if err := vm.call(ctx, "migrate-set-capabilities", ignoreShared, nil); err != nil {
		return err
	}
	if err := vm.call(ctx, "getfd", object{"fdname": stateName}, nil, f); err != nil {
		return err
	}
	if err := vm.call(ctx, "migrate", object{"uri": "fd:" + stateName}, nil); err != nil {
		return err
	}
	if err := vm.saved(ctx); err != nil {
		return err
	}
	return f.Sync()
}

// saved waits for the end of a migration.
func (vm *machine) saved(ctx context.Context) error {
	for {
		var m struct {
			Status string `json:"status"`
			Error  string `json:"error-desc"`
		}
		if err := vm.call(ctx, "query-migrate", nil, &m); err != nil {
			return err
		}
		switch m.Status {
		case "completed":
			return nil
		case "failed", "cancelled":
			return fmt.Errorf("saving the state %s: %q: %w", m.Status, m.Error, errdefs.ErrInternal)
		}
		timer := time.NewTimer(saveAgain)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return context.Cause(ctx)
		}
	}
}
