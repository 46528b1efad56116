// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package cloudhypervisor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// layout names how a snapshot is made: the guest's RAM is a memory zone's file, which
// the template maps shared and its clones privately. Another way of a later release is
// another layout.
const layout = "zone-file"

// A snapshot's files. There is none of the hypervisor's own for the RAM, as long as
// nothing was plugged.
const (
	memoryName = "memory"
	configName = "config.json"
	stateName  = "state.json"
	rangesName = "memory-ranges"
)

// Snapshot saves configuration and state beside the memory file.
func (vm *machine) Snapshot(ctx context.Context) (_ vmm.Snapshot, retErr error) {
	vm.mu.Lock()
	own := vm.own
	vm.mu.Unlock()
	if own.MemoryFile == "" {
		return vmm.Snapshot{}, fmt.Errorf("cloud-hypervisor: snapshot of VM %s: it was booted without a memory file: %w", vm.ID(), errdefs.ErrFailedPrecondition)
	}
	info, err := vm.info(ctx)
	if err != nil {
		return vmm.Snapshot{}, err
	}
	if info.State != statePaused {
		return vmm.Snapshot{}, fmt.Errorf("cloud-hypervisor: snapshot of VM %s: it is not paused: %w", vm.ID(), errdefs.ErrFailedPrecondition)
	}
	dir := filepath.Dir(own.MemoryFile)
	defer func() {
		if retErr != nil {
			retErr = errors.Join(retErr, removeState(dir))
		}
	}()
	if err := removeState(dir); err != nil {
		return vmm.Snapshot{}, fmt.Errorf("cloud-hypervisor: snapshot of VM %s: %w", vm.ID(), err)
	}
	if err := vm.put(ctx, "vm.snapshot", snapshotConfig{URL: "file://" + dir}); err != nil {
		return vmm.Snapshot{}, err
	}
	// What it has written is looked at when it can no longer be changed.
	if vm.State().UID != 0 {
		err = seal(dir)
	}
	if err == nil {
		err = editConfig(filepath.Join(dir, configName))
	}
	if err != nil {
		return vmm.Snapshot{}, fmt.Errorf("cloud-hypervisor: snapshot of VM %s: %w", vm.ID(), err)
	}
	size := vmm.Size{VCPUs: info.Config.CPUs.Boot, MemoryBytes: own.Base}
	return vmm.Snapshot{Driver: Name, Layout: layout, Dir: dir, Size: size, Max: own.Max, BuiltInNIC: own.BuiltInNIC}, nil
}

// removeState removes what an earlier snapshot left, which the hypervisor would not
// write over.
func removeState(dir string) error {
	var errs []error
	for _, name := range []string{configName, stateName, rangesName} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// maxConfig bounds a machine's configuration, which the hypervisor writes, in bytes.
const maxConfig = 1 << 20

// editConfig makes clones map the RAM privately: a page is copied when it is written.
// All else in the configuration holds for each of them, as paths are relative to the
// VM's own directory. The kernel's is made so: it is not read again. The file is a new
// one, which the template's hypervisor does not have open, with the old one's mode.
func editConfig(path string) error {
	text, mode, err := readConfig(path)
	if err != nil {
		return err
	}
	var config map[string]any
	numbers := json.NewDecoder(bytes.NewReader(text))
	numbers.UseNumber() // as they are written
	if err := numbers.Decode(&config); err != nil {
		return fmt.Errorf("%s: %w", configName, err)
	}
	if err := unshare(config); err != nil {
		return fmt.Errorf("%s: %w", configName, err)
	}
	if text, err = json.Marshal(config); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	return errors.Join(err, f.Chmod(mode), f.Close())
}

// readConfig reads a file that a hypervisor has made: no link, no FIFO, and not without end.
func readConfig(path string) (text []byte, mode os.FileMode, _ error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close() //nolint:errcheck // only read
	info, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxConfig {
		return nil, 0, fmt.Errorf("%s: %v of %d bytes, want a file of at most %d: %w", configName, info.Mode().Type(), info.Size(), maxConfig, errdefs.ErrPermissionDenied)
	}
	text, err = io.ReadAll(io.LimitReader(f, maxConfig))
	return text, info.Mode().Perm(), err
}

// unshare turns off the sharing of the guest's RAM, and names no path of the template's.
func unshare(config map[string]any) error {
	memory, ok := config["memory"].(map[string]any)
	if !ok {
		return fmt.Errorf("no memory: %w", errdefs.ErrInternal)
	}
	zones, ok := memory["zones"].([]any)
	if !ok || len(zones) != 1 {
		return fmt.Errorf("want one memory zone: %w", errdefs.ErrInternal)
	}
	z, ok := zones[0].(map[string]any)
	if !ok || z["shared"] != true || memory["thp"] != false {
		return fmt.Errorf("want a memory zone that is shared, without huge pages: %w", errdefs.ErrInternal)
	}
	z["shared"] = false
	payload, ok := config["payload"].(map[string]any)
	if !ok {
		return fmt.Errorf("no payload: %w", errdefs.ErrInternal)
	}
	payload["kernel"] = kernelLink
	return nil
}
