// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmproc"
)

const (
	// undoStep bounds one command that undoes another.
	undoStep = 2 * time.Second
	// askAgain is after how long a guest that has not given a device back is asked
	// again: one that was still starting loses the request.
	askAgain = 2 * time.Second
)

const (
	// peripherals is where QEMU lists the devices that have IDs.
	peripherals = "/machine/peripheral"
	// memoryPlug is what plugs memory.
	memoryPlug = peripherals + "/" + memoryDevice
)

// object is QMP arguments.
type object map[string]any

func diskID(serial string) string { return "disk-" + serial }

func nicID(id string) string { return "nic-" + id }

// AddDisk puts a disk into the image disk, or hot-plugs a block device.
func (vm *machine) AddDisk(ctx context.Context, disk vmm.Disk) (string, error) {
	if err := disk.Validate(); err != nil {
		return "", fmt.Errorf("qemu: %w", err)
	}
	unlock, err := vm.Lock(ctx, diskLock(disk.Serial))
	if err != nil {
		return "", fmt.Errorf("add disk %s: %w", disk.Serial, err)
	}
	defer unlock()
	serial := vmm.ImageSerial
	done := false
	if fitsImageDisk(disk) {
		done, err = vm.putImage(ctx, disk)
	}
	if err == nil && !done {
		serial = disk.Serial
		err = vm.plugDisk(ctx, disk)
	}
	if err != nil {
		return "", fmt.Errorf("add disk %s: %w", disk.Serial, err)
	}
	return serial, nil
}

// diskLock keeps calls about one disk apart, wherever it is.
func diskLock(serial string) string { return "of-" + diskID(serial) }

// plugDisk hot-plugs a block device.
func (vm *machine) plugDisk(ctx context.Context, disk vmm.Disk) (retErr error) {
	id := diskID(disk.Serial)
	release, err := vm.claim(ctx, id)
	if err != nil {
		return err
	}
	defer func() { release(retErr) }()
	device := object{
		"driver": "virtio-blk-pci", "id": id, "bus": vm.slotOf(id), "disable-legacy": "on",
		"drive": id, "serial": disk.Serial,
		"werror": "report", "rerror": "report",
	}
	if err := setBlockSizes(device, disk.Path); err != nil {
		return err
	}
	if err := vm.addNode(ctx, id, disk); err != nil {
		return err
	}
	defer vm.undoOnError(ctx, &retErr, "blockdev-del", object{"node-name": id})
	return vm.call(ctx, "device_add", device, nil)
}

// addNode makes a block node of a disk's file.
func (vm *machine) addNode(ctx context.Context, id string, disk vmm.Disk) error {
	return vm.withFile(ctx, disk, func(file object) error {
		args := object{"driver": "raw", "node-name": id, "read-only": disk.ReadOnly, "discard": "unmap", "file": file}
		err := vm.call(ctx, "blockdev-add", args, nil)
		if isAnswer(err) && vm.call(ctx, "blockdev-del", object{"node-name": id}, nil) == nil {
			// A call that was given up half-way had left it.
			err = vm.call(ctx, "blockdev-add", args, nil)
		}
		return err
	})
}

// withFile hands QEMU a disk's file, which it need not be able to open, as long as use
// makes a node of it.
func (vm *machine) withFile(ctx context.Context, disk vmm.Disk, use func(file object) error) error {
	mode := os.O_RDWR
	if disk.ReadOnly {
		mode = os.O_RDONLY
	}
	f, err := os.OpenFile(disk.Path, mode, 0)
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	defer f.Close() //nolint:errcheck // QEMU has its own
	driver, err := driverOf(f)
	if err != nil {
		return err
	}
	var set struct {
		ID int `json:"fdset-id"`
	}
	if err := vm.call(ctx, "add-fd", object{"opaque": disk.Path}, &set, f); err != nil {
		return err
	}
	// The node has a file of its own by then, or needs none.
	defer func() { _ = vm.undo(ctx, "remove-fd", object{"fdset-id": set.ID}) }()
	return use(object{"driver": driver, "filename": setPath(set.ID), "locking": "off"})
}

// RemoveDisk empties the image disk, or unplugs a block device.
func (vm *machine) RemoveDisk(ctx context.Context, serial string) error {
	unlock, err := vm.Lock(ctx, diskLock(serial))
	if err != nil {
		return fmt.Errorf("remove disk %s: %w", serial, err)
	}
	defer unlock()
	done, err := vm.takeImage(ctx, serial)
	if err == nil && !done {
		err = vm.unplugDisk(ctx, serial)
	}
	if err != nil {
		return fmt.Errorf("remove disk %s: %w", serial, err)
	}
	return nil
}

// unplugDisk unplugs a block device.
func (vm *machine) unplugDisk(ctx context.Context, serial string) error {
	id := diskID(serial)
	unlock, err := vm.Lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	if err := vm.unplug(ctx, id); err != nil {
		return err
	}
	err = vm.call(ctx, "blockdev-del", object{"node-name": id}, nil)
	if isAnswer(err) && !vm.hasNode(ctx, id) {
		err = nil
	}
	return err
}

// hasNode tells whether a block node exists; QEMU has no error class for that.
func (vm *machine) hasNode(ctx context.Context, name string) bool {
	nodes, err := vm.nodes(ctx)
	return err != nil || slices.Contains(nodes, name)
}

// nodes are the names of QEMU's block nodes.
func (vm *machine) nodes(ctx context.Context) ([]string, error) {
	var nodes []struct {
		Name string `json:"node-name"`
	}
	if err := vm.call(ctx, "query-named-block-nodes", object{"flat": true}, &nodes); err != nil {
		return nil, err
	}
	names := make([]string, len(nodes))
	for i, n := range nodes {
		names[i] = n.Name
	}
	return names, nil
}

// AddNIC hot-plugs a network device on the caller's TAP files.
func (vm *machine) AddNIC(ctx context.Context, nic vmm.NIC) (retErr error) {
	if err := nic.Validate(); err != nil {
		return fmt.Errorf("qemu: %w", err)
	}
	id := nicID(nic.ID)
	release, err := vm.claim(ctx, id)
	if err != nil {
		return fmt.Errorf("add NIC %s: %w", nic.ID, err)
	}
	defer func() { release(retErr) }()
	if err := vm.addNetdev(ctx, id, nic.Queues); err != nil {
		return fmt.Errorf("add NIC %s: %w", nic.ID, err)
	}
	defer vm.undoOnError(ctx, &retErr, "netdev_del", object{"id": id})
	device := object{
		"driver": "virtio-net-pci", "id": id, "bus": vm.slotOf(id), "disable-legacy": "on", "netdev": id, "mac": nic.MAC.String(), "romfile": "",
		"mq": len(nic.Queues) > 1, "vectors": 2*len(nic.Queues) + 2,
	}
	if nic.MTU > 0 {
		device["host_mtu"] = nic.MTU
	}
	if err := vm.call(ctx, "device_add", device, nil); err != nil {
		return fmt.Errorf("add NIC %s: %w", nic.ID, err)
	}
	return nil
}

// addNetdev hands QEMU the TAP's files, and makes its end of the network of them.
func (vm *machine) addNetdev(ctx context.Context, id string, queues []*os.File) (retErr error) {
	names := make([]string, len(queues))
	if err := attachQueues(queues); err != nil {
		return err
	}
	for i, f := range queues {
		names[i] = id + "-" + strconv.Itoa(i)
		// A file of that name which an earlier call left is replaced.
		if err := vm.call(ctx, "getfd", object{"fdname": names[i]}, nil, f); err != nil {
			return err
		}
		defer func() {
			if retErr != nil {
				// Often QEMU has closed it already.
				_ = vm.undo(ctx, "closefd", object{"fdname": names[i]})
			}
		}()
	}
	netdev := object{"type": "tap", "id": id, "vhost": false}
	if len(names) == 1 {
		netdev["fd"] = names[0]
	} else {
		netdev["fds"] = strings.Join(names, ":")
	}
	// One may be left of a call that was given up half-way.
	_ = vm.call(ctx, "netdev_del", object{"id": id}, nil)
	return vm.call(ctx, "netdev_add", netdev, nil)
}

// attachQueues makes all queues of a TAP active. QEMU leaves them detached where
// a guest did not use them, and aborts if it then gets such files once more.
func attachQueues(queues []*os.File) error {
	if len(queues) < 2 {
		return nil
	}
	req, err := unix.NewIfreq("tap")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_ATTACH_QUEUE)
	return vmproc.WithFDs(queues, func(fds []int) error {
		for _, fd := range fds {
			// EINVAL: it is active.
			if err := unix.IoctlIfreq(fd, unix.TUNSETQUEUE, req); err != nil && !errors.Is(err, unix.EINVAL) {
				return fmt.Errorf("attach a queue of the TAP: %w", err)
			}
		}
		return nil
	})
}

// RemoveNIC unplugs a network device.
func (vm *machine) RemoveNIC(ctx context.Context, id string) error {
	unlock, err := vm.Lock(ctx, nicID(id))
	if err != nil {
		return fmt.Errorf("remove NIC %s: %w", id, err)
	}
	defer unlock()
	if err := vm.unplug(ctx, nicID(id)); err != nil {
		return fmt.Errorf("remove NIC %s: %w", id, err)
	}
	if err := vm.call(ctx, "netdev_del", object{"id": nicID(id)}, nil); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("remove NIC %s: %w", id, err)
	}
	return nil
}

// unplug asks the guest to give a device back and waits until it has.
func (vm *machine) unplug(ctx context.Context, id string) (retErr error) {
	deleted, stop, err := vm.expect(ctx, func(e event) bool {
		var about struct {
			Device string `json:"device"`
		}
		return e.Name == "DEVICE_DELETED" && json.Unmarshal(e.Data, &about) == nil && about.Device == id
	})
	if err != nil {
		return err
	}
	defer stop()
	defer func() {
		if retErr == nil {
			vm.freeSlot(id)
		}
	}()
	for {
		err := vm.call(ctx, "device_del", object{"id": id}, nil)
		switch {
		case errdefs.IsNotFound(err):
			return nil
		case err != nil && !isAnswer(err):
			return err
		}
		// An error may mean no more than that the guest has been asked before.
		timer := time.NewTimer(askAgain)
		select {
		case <-deleted:
			timer.Stop()
			return nil
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("the guest does not give %s back: %w", id, errors.Join(context.Cause(ctx), err))
		}
	}
}

// isAnswer tells whether QEMU has answered, with an error.
func isAnswer(err error) bool {
	var answer *qmpError
	return errors.As(err, &answer)
}

// Resize sets how much memory is plugged. All vCPUs that Max allows are there
// from the start, and the agent decides which are on line.
func (vm *machine) Resize(ctx context.Context, size vmm.Size) error {
	vm.mu.Lock()
	own := vm.own
	vm.mu.Unlock()
	if err := vmm.CheckResize(size, vmm.Size{VCPUs: 1, MemoryBytes: own.Base}, own.Max); err != nil {
		return fmt.Errorf("qemu: %w", err)
	}
	unlock, err := vm.Lock(ctx, memoryDevice)
	if err != nil {
		return fmt.Errorf("resize memory: %w", err)
	}
	defer unlock()
	err = vm.Resized(ctx, size, func() error { return vm.resizeMemory(ctx, size, own) })
	if err != nil {
		return fmt.Errorf("resize memory: %w", err)
	}
	return nil
}

// resizeMemory asks the guest to have as much memory plugged as makes a size, and waits
// for it to give the rest back.
func (vm *machine) resizeMemory(ctx context.Context, size vmm.Size, own data) error {
	plug := size.MemoryBytes - own.Base
	hasMore := own.Max.MemoryBytes > own.Base
	if plug == 0 && vm.isUnplugged() {
		hasMore = false // as with most pods: there is nothing to ask for
	}
	if err := vm.Check(); err != nil {
		return err
	}
	if hasMore {
		vm.setUnplugged(false)
		if err := vm.requestMemory(ctx, plug); err != nil {
			return err
		}
	}
	vm.mu.Lock()
	vm.own.Size = size
	vm.mu.Unlock()
	if !hasMore {
		return nil
	}
	plugged, err := vm.awaitShrink(ctx, plug)
	if err != nil {
		return err
	}
	if plugged > plug {
		return &vmm.KeptError{MemoryBytes: own.Base + plugged, Wanted: size.MemoryBytes}
	}
	vm.setUnplugged(plug == 0)
	return nil
}

func (vm *machine) isUnplugged() bool {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return vm.unplugged
}

func (vm *machine) setUnplugged(yes bool) {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	vm.unplugged = yes
}

// requestMemory asks the guest to have so many bytes plugged.
func (vm *machine) requestMemory(ctx context.Context, bytes int64) error {
	return vm.call(ctx, "qom-set", object{"path": memoryPlug, "property": "requested-size", "value": bytes}, nil)
}

// awaitShrink waits until no more than so many bytes are plugged, and returns how many
// are. A guest's driver that meets a page in use tries again after 50 s, or at once when
// it is told of a change, which QEMU does although there is none.
func (vm *machine) awaitShrink(ctx context.Context, bytes int64) (int64, error) {
	return vmproc.AwaitShrink(ctx, bytes,
		func(ctx context.Context) (plugged int64, _ error) {
			err := vm.call(ctx, "qom-get", object{"path": memoryPlug, "property": "size"}, &plugged)
			return plugged, err
		},
		func(ctx context.Context) error { return vm.requestMemory(ctx, bytes) })
}

// Pause stops the vCPUs.
func (vm *machine) Pause(ctx context.Context) error { return vm.call(ctx, "stop", nil, nil) }

// Resume lets the vCPUs run.
func (vm *machine) Resume(ctx context.Context) error { return vm.call(ctx, "cont", nil, nil) }

// undoOnError runs a command if *retErr is set, and adds its failure.
func (vm *machine) undoOnError(ctx context.Context, retErr *error, command string, args object) {
	if *retErr == nil {
		return
	}
	if err := vm.undo(ctx, command, args); err != nil && !errdefs.IsUnavailable(err) {
		*retErr = errors.Join(*retErr, err)
	}
}

// undo runs a command although ctx may have ended.
func (vm *machine) undo(ctx context.Context, command string, args object) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoStep)
	defer cancel()
	return vm.call(ctx, command, args, nil)
}
