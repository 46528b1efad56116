// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
	"github.com/containerd/errdefs"
)

// undoStep bounds one command that undoes another.
const undoStep = 2 * time.Second

var idPattern = regexp.MustCompile(`^[a-z0-9-]{1,20}$`)

// object is QMP arguments.
type object map[string]any

// AddDisk hot-plugs a block device.
func (vm *machine) AddDisk(ctx context.Context, disk vmm.Disk) (retErr error) {
	if !idPattern.MatchString(disk.Serial) || !filepath.IsAbs(disk.Path) {
		return fmt.Errorf("qemu: disk %q at %q: want a serial of 1 to 20 of [a-z0-9-] and an absolute path: %w",
			disk.Serial, disk.Path, errdefs.ErrInvalidArgument)
	}
	node := "disk-" + disk.Serial
	file := object{"driver": "file", "filename": disk.Path, "locking": "off"}
	args := object{"driver": "raw", "node-name": node, "read-only": disk.ReadOnly, "file": file}
	if err := vm.call(ctx, "blockdev-add", args, nil); err != nil {
		return fmt.Errorf("add disk %s: %w", disk.Serial, err)
	}
	defer vm.undoOnError(ctx, &retErr, "blockdev-del", object{"node-name": node})
	device := object{
		"driver": "virtio-blk-pci", "id": node, "drive": node, "serial": disk.Serial,
		"werror": "report", "rerror": "report",
	}
	if err := vm.call(ctx, "device_add", device, nil); err != nil {
		return fmt.Errorf("add disk %s: %w", disk.Serial, err)
	}
	return nil
}

// RemoveDisk unplugs a block device.
func (vm *machine) RemoveDisk(ctx context.Context, serial string) error {
	node := "disk-" + serial
	if err := vm.unplug(ctx, node); err != nil {
		return fmt.Errorf("remove disk %s: %w", serial, err)
	}
	if err := vm.call(ctx, "blockdev-del", object{"node-name": node}, nil); err != nil && !missing(err) {
		return fmt.Errorf("remove disk %s: %w", serial, err)
	}
	return nil
}

// AddNIC hot-plugs a network device on the caller's TAP files.
func (vm *machine) AddNIC(ctx context.Context, nic vmm.NIC) (retErr error) {
	if !idPattern.MatchString(nic.ID) || len(nic.Queues) == 0 || len(nic.MAC) != 6 {
		return fmt.Errorf("qemu: NIC %q: want an ID of 1 to 20 of [a-z0-9-], a MAC and a queue: %w", nic.ID, errdefs.ErrInvalidArgument)
	}
	id := "nic-" + nic.ID
	names := make([]string, len(nic.Queues))
	for i, f := range nic.Queues {
		names[i] = id + "-" + strconv.Itoa(i)
		if err := vm.call(ctx, "getfd", object{"fdname": names[i]}, nil, f); err != nil {
			return fmt.Errorf("add NIC %s: %w", nic.ID, err)
		}
	}
	netdev := object{"type": "tap", "id": id, "vhost": false}
	if len(names) == 1 {
		netdev["fd"] = names[0]
	} else {
		netdev["fds"] = strings.Join(names, ":")
	}
	if err := vm.call(ctx, "netdev_add", netdev, nil); err != nil {
		for _, name := range names {
			defer vm.undoOnError(ctx, &retErr, "closefd", object{"fdname": name})
		}
		return fmt.Errorf("add NIC %s: %w", nic.ID, err)
	}
	defer vm.undoOnError(ctx, &retErr, "netdev_del", object{"id": id})
	device := object{
		"driver": "virtio-net-pci", "id": id, "netdev": id, "mac": nic.MAC.String(), "romfile": "",
		"mq": len(names) > 1, "vectors": 2*len(names) + 2,
	}
	if nic.MTU > 0 {
		device["host_mtu"] = nic.MTU
	}
	if err := vm.call(ctx, "device_add", device, nil); err != nil {
		return fmt.Errorf("add NIC %s: %w", nic.ID, err)
	}
	return nil
}

// RemoveNIC unplugs a network device.
func (vm *machine) RemoveNIC(ctx context.Context, id string) error {
	if err := vm.unplug(ctx, "nic-"+id); err != nil {
		return fmt.Errorf("remove NIC %s: %w", id, err)
	}
	if err := vm.call(ctx, "netdev_del", object{"id": "nic-" + id}, nil); err != nil && !missing(err) {
		return fmt.Errorf("remove NIC %s: %w", id, err)
	}
	return nil
}

// unplug asks the guest to give a device back and waits until it has.
func (vm *machine) unplug(ctx context.Context, id string) error {
	wait := vm.monitor().expect(func(e event) bool {
		var about struct {
			Device string `json:"device"`
		}
		return e.Name == "DEVICE_DELETED" && json.Unmarshal(e.Data, &about) == nil && about.Device == id
	})
	err := vm.call(ctx, "device_del", object{"id": id}, nil)
	if err != nil {
		canceled, cancel := context.WithCancel(ctx)
		cancel()
		_ = wait(canceled)
		if missing(err) {
			return nil
		}
		return err
	}
	return wait(ctx)
}

// missing tells whether QEMU does not know what a command was about. Some
// commands have no class of their own for it, so what exists is asked elsewhere:
// a device is always removed before its back end.
func missing(err error) bool { return errors.Is(err, errdefs.ErrNotFound) }

// Resize sets how much memory is plugged. All vCPUs that Max allows are there
// from the start, and the agent decides which are on line.
func (vm *machine) Resize(ctx context.Context, size vmm.Size) error {
	vm.mu.Lock()
	own := vm.own
	vm.mu.Unlock()
	switch {
	case size.VCPUs < 1 || size.VCPUs > own.Max.VCPUs:
		return fmt.Errorf("qemu: resize to %d vCPUs: want 1 to %d: %w", size.VCPUs, own.Max.VCPUs, errdefs.ErrInvalidArgument)
	case size.MemoryBytes < own.Base || size.MemoryBytes > own.Max.MemoryBytes || size.MemoryBytes%MemoryBlock != 0:
		return fmt.Errorf("qemu: resize to %d bytes of memory: want %d to %d, a multiple of %d: %w",
			size.MemoryBytes, own.Base, own.Max.MemoryBytes, MemoryBlock, errdefs.ErrInvalidArgument)
	}
	if own.Max.MemoryBytes > own.Base {
		args := object{"path": "/machine/peripheral/" + memoryDevice, "property": "requested-size", "value": size.MemoryBytes - own.Base}
		if err := vm.call(ctx, "qom-set", args, nil); err != nil {
			return fmt.Errorf("resize memory: %w", err)
		}
	}
	vm.mu.Lock()
	defer vm.mu.Unlock()
	vm.own.Size = size
	return nil
}

// Pause stops the vCPUs.
func (vm *machine) Pause(ctx context.Context) error { return vm.call(ctx, "stop", nil, nil) }

// Resume lets the vCPUs run.
func (vm *machine) Resume(ctx context.Context) error { return vm.call(ctx, "cont", nil, nil) }

// Snapshot is not there yet.
func (vm *machine) Snapshot(context.Context, string) (vmm.Snapshot, error) {
	return vmm.Snapshot{}, fmt.Errorf("qemu: snapshot: %w", errdefs.ErrNotImplemented)
}

// undoOnError runs a command if *retErr is set, and adds its failure.
func (vm *machine) undoOnError(ctx context.Context, retErr *error, command string, args object) {
	if *retErr == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoStep)
	defer cancel()
	if err := vm.call(ctx, command, args, nil); err != nil && !errors.Is(err, errdefs.ErrUnavailable) {
		*retErr = errors.Join(*retErr, err)
	}
}
