// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package cloudhypervisor

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

const (
	// undoStep bounds one call that undoes another.
	undoStep = 2 * time.Second
	// lookAgain is after how long it is looked whether a device has gone without a word.
	lookAgain = 2 * time.Second
	// settleLimit is for how long a device is not asked for that the guest does not use yet.
	settleLimit = 10 * time.Second
)

const (
	diskPrefix = "disk-"
	nicPrefix  = "nic-"
)

// AddDisk hot-plugs a block device.
func (vm *machine) AddDisk(ctx context.Context, disk vmm.Disk) (string, error) {
	if err := disk.Validate(); err != nil {
		return "", fmt.Errorf("cloud-hypervisor: %w", err)
	}
	id := diskPrefix + disk.Serial
	err := vm.plug(ctx, id, func() error {
		path, err := vm.lend(disk)
		if err == nil {
			err = vm.put(ctx, "vm.add-disk", diskConfig{ID: id, Path: path, ReadOnly: disk.ReadOnly, Serial: disk.Serial, ImageType: imageRaw, Sparse: !disk.ReadOnly})
		}
		if err != nil {
			// A hypervisor that says so, or nothing, has no more of it than what it has opened.
			err = errors.Join(err, vm.takeBack(disk.Serial))
		}
		return err
	})
	if err != nil {
		return "", fmt.Errorf("add disk %s: %w", disk.Serial, err)
	}
	return disk.Serial, nil
}

// RemoveDisk unplugs a block device.
func (vm *machine) RemoveDisk(ctx context.Context, serial string) error {
	if err := vm.remove(ctx, diskPrefix+serial, func() error { return vm.takeBack(serial) }); err != nil {
		return fmt.Errorf("remove disk %s: %w", serial, err)
	}
	return nil
}

// AddNIC hot-plugs a network device on the caller's TAP files.
func (vm *machine) AddNIC(ctx context.Context, nic vmm.NIC) error {
	if err := nic.Validate(); err != nil {
		return fmt.Errorf("cloud-hypervisor: %w", err)
	}
	// The hypervisor may not, and tells the guest what it finds.
	if err := vm.setMTU(nic); err != nil {
		return fmt.Errorf("add NIC %s: %w", nic.ID, err)
	}
	id := nicPrefix + nic.ID
	err := vm.plug(ctx, id, func() error {
		// Each pair is a queue for each direction.
		args := netConfig{ID: id, MAC: nic.MAC.String(), Queues: 2 * len(nic.Queues)}
		return vm.put(ctx, "vm.add-net", args, nic.Queues...)
	})
	if err != nil {
		return fmt.Errorf("add NIC %s: %w", nic.ID, err)
	}
	return nil
}

// RemoveNIC unplugs a network device.
func (vm *machine) RemoveNIC(ctx context.Context, id string) error {
	if err := vm.remove(ctx, nicPrefix+id, func() error { return nil }); err != nil {
		return fmt.Errorf("remove NIC %s: %w", id, err)
	}
	return nil
}

// plug plugs a device that must not be there yet.
func (vm *machine) plug(ctx context.Context, id string, add func() error) error {
	unlock, err := vm.Lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	vm.mu.Lock()
	plugged, doubt := vm.plugged[id], vm.doubt[id]
	vm.mu.Unlock()
	if plugged {
		return fmt.Errorf("device %s: %w", id, errdefs.ErrAlreadyExists)
	}
	if doubt {
		// It may have been plugged after its call had been given up.
		if err := vm.unplug(ctx, id); err != nil {
			return err
		}
	}
	first := vm.expectUse(id)
	if err = add(); err == nil {
		vm.note(id, true, false)
		vm.watch(id, first)
		return nil
	}
	if !isAnswer(err) {
		vm.note(id, false, true)
		vm.watch(id, first)
		vm.disown(context.WithoutCancel(ctx), id)
		return err
	}
	first.stop()
	if info, infoErr := vm.info(ctx); infoErr == nil && info.slots() >= maxDevices {
		err = fmt.Errorf("all %d places of the machine's bus are in use: %w: %w", maxDevices, err, errdefs.ErrResourceExhausted)
	}
	return err
}

// disown asks the guest to give back a device whose plugging was given up. Who comes
// next about that device looks what came of it.
func (vm *machine) disown(ctx context.Context, id string) {
	ctx, cancel := context.WithTimeout(ctx, undoStep)
	defer cancel()
	if there, err := vm.has(ctx, id); err != nil || !there || !vm.settled(ctx, id) {
		return
	}
	_ = vm.put(ctx, "vm.remove-device", removeDevice{ID: id})
}

// note writes down whether a device is plugged in, or may be.
func (vm *machine) note(id string, plugged, doubt bool) {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	delete(vm.plugged, id)
	delete(vm.doubt, id)
	if u, ok := vm.fresh[id]; ok {
		u.stop()
		delete(vm.fresh, id)
	}
	if plugged {
		vm.plugged[id] = true
	}
	if doubt {
		vm.doubt[id] = true
	}
}

// use is the guest's first of a device. While the guest sets a device up, Cloud Hypervisor must
// not be asked to remove it: until version 53 at least, remove_device holds the lock of the device
// tree and waits for the device's, while a processor that moves the device's BAR has them the other way round
// (vmm/src/device_manager.rs, AddressManager::move_bar), and neither it nor the API ever answers again.
type use struct {
	seen <-chan event
	stop func()
}

// expectUse begins to wait for the guest's first use of a device. The caller hands it to watch,
// or stops it.
func (vm *machine) expectUse(id string) (u use) {
	u.seen, u.stop = vm.events.expect(func(e event) bool {
		return e.Source == sourceDevice && e.Name == eventActivated && e.Properties[propertyID] == id
	})
	return u
}

// watch keeps u until the device is gone, or used.
func (vm *machine) watch(id string, u use) {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	vm.fresh[id] = u
}

// settled waits until the guest uses a device, for at most settleLimit, and reports whether it does.
// One that was plugged in before this process knew of the VM it does.
func (vm *machine) settled(ctx context.Context, id string) bool {
	vm.mu.Lock()
	u, ok := vm.fresh[id]
	vm.mu.Unlock()
	if !ok {
		return true
	}
	limit := time.NewTimer(settleLimit)
	defer limit.Stop()
	select {
	case <-u.seen:
	case <-limit.C:
		return false
	case <-vm.Done():
		return false
	case <-ctx.Done():
		return false
	}
	vm.mu.Lock()
	defer vm.mu.Unlock()
	delete(vm.fresh, id)
	return true
}

// remove unplugs a device, and then cleans up after it before it can be plugged in again.
// What is not there is removed.
func (vm *machine) remove(ctx context.Context, id string, cleanUp func() error) error {
	unlock, err := vm.Lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	if err := vm.unplug(ctx, id); err != nil {
		return err
	}
	return cleanUp()
}

// unplug asks the guest to give a device back and waits until it has.
func (vm *machine) unplug(ctx context.Context, id string) error {
	gone, stop := vm.events.expect(func(e event) bool {
		return e.Source == sourceVM && e.Name == eventRemoved && e.Properties[propertyID] == id
	})
	defer stop()
	look := time.NewTicker(lookAgain)
	defer look.Stop()
	var refused error
	for asked := false; ; {
		there, err := vm.has(ctx, id)
		if err != nil {
			return err
		}
		if !there {
			vm.note(id, false, false)
			return nil
		}
		if !asked {
			// A guest that has not used it by then has no driver for it, or stands still.
			vm.settled(ctx, id)
			refused = vm.put(ctx, "vm.remove-device", removeDevice{ID: id})
			// An error may mean no more than that the guest has been asked before.
			if refused != nil && !isAnswer(refused) {
				return refused
			}
			asked = true
		}
		select {
		case <-gone:
			vm.note(id, false, false)
			return nil
		case <-look.C:
		case <-vm.Done():
			return vm.Check()
		case <-ctx.Done():
			return fmt.Errorf("the guest does not give %s back: %w", id, errors.Join(context.Cause(ctx), refused))
		}
	}
}

// has asks whether there is a device, also one that the guest is to give back.
func (vm *machine) has(ctx context.Context, id string) (bool, error) {
	info, err := vm.info(ctx)
	if err != nil {
		return false, err
	}
	_, there := info.Devices[id]
	return there, nil
}

// slots is how many devices sit on the machine's bus.
func (i *vmInfo) slots() int {
	n := 0
	for _, d := range i.Devices {
		if d.Address != nil {
			n++
		}
	}
	return n
}

// findDevices learns which devices are plugged in.
func (vm *machine) findDevices(ctx context.Context) error {
	info, err := vm.info(ctx)
	if err != nil {
		return err
	}
	vm.mu.Lock()
	defer vm.mu.Unlock()
	for id := range info.Devices {
		if strings.HasPrefix(id, diskPrefix) || strings.HasPrefix(id, nicPrefix) {
			vm.plugged[id] = true
		}
	}
	return nil
}
