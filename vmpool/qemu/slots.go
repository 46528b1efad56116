// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package qemu

import (
	"context"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// claim is Lock for a device that must not exist yet, with a slot for it. The
// caller calls the function that it returns, with what came of it.
func (vm *machine) claim(ctx context.Context, id string) (release func(error), _ error) {
	unlock, err := vm.Lock(ctx, id)
	if err != nil {
		return nil, err
	}
	err = vm.settle(ctx)
	if err == nil && vm.inDoubt(id) {
		// It was plugged after its call had been given up.
		err = vm.unplug(ctx, id)
	}
	if err != nil {
		unlock()
		return nil, err
	}
	vm.mu.Lock()
	switch free := slices.Index(vm.slots[:], ""); {
	case slices.Contains(vm.slots[:], id):
		err = fmt.Errorf("device %s: %w", id, errdefs.ErrAlreadyExists)
	case free < 0:
		err = fmt.Errorf("all %d slots are in use: %w", slots, errdefs.ErrResourceExhausted)
	default:
		vm.slots[free] = id
	}
	vm.mu.Unlock()
	if err != nil {
		unlock()
		return nil, err
	}
	return func(err error) {
		defer unlock()
		if err != nil {
			vm.disown(context.WithoutCancel(ctx), id)
		}
	}, nil
}

// disown gives back the slot of a device whose plugging failed. QEMU may have
// plugged it all the same, or be about to: the guest is then asked to let it go,
// and the slot is in use until it has.
func (vm *machine) disown(ctx context.Context, id string) {
	vm.mu.Lock()
	vm.failures++
	vm.doubt[id] = vm.failures
	vm.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, undoStep)
	defer cancel()
	if err := vm.settle(ctx); err != nil {
		return // the next claim asks again
	}
	if vm.inDoubt(id) {
		_ = vm.call(ctx, "device_del", object{"id": id}, nil)
	}
}

func (vm *machine) inDoubt(id string) bool {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return vm.doubt[id] != 0
}

// settle finds out which devices in doubt there are not, and frees their slots.
func (vm *machine) settle(ctx context.Context) error {
	vm.mu.Lock()
	doubt := maps.Clone(vm.doubt)
	vm.mu.Unlock()
	if len(doubt) == 0 {
		return nil
	}
	// QEMU takes commands in order: this one comes after those that are in doubt.
	devices, err := vm.devices(ctx)
	if err != nil {
		return fmt.Errorf("find out what is plugged in: %w", err)
	}
	for id, failure := range doubt {
		if _, plugged := devices[id]; !plugged {
			vm.freeIf(id, func() bool { return vm.doubt[id] == failure })
		}
	}
	return nil
}

// slotOf is the name of the slot that claim gave to a device.
func (vm *machine) slotOf(id string) string {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return slotName(slices.Index(vm.slots[:], id))
}

// hasSlot tells whether a device has a slot, be it in doubt.
func (vm *machine) hasSlot(id string) bool {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return slices.Contains(vm.slots[:], id)
}

// freeSlot frees the slot of a device that is gone.
func (vm *machine) freeSlot(id string) {
	vm.freeIf(id, func() bool { return true })
}

// freeIf frees a device's slot if that is right, which is asked under the lock.
func (vm *machine) freeIf(id string, right func() bool) {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if !right() {
		return
	}
	delete(vm.doubt, id)
	if slot := slices.Index(vm.slots[:], id); slot >= 0 {
		vm.slots[slot] = ""
	}
}

// findSlots learns from QEMU which devices are in which slots.
func (vm *machine) findSlots(ctx context.Context) error {
	devices, err := vm.devices(ctx)
	if err != nil {
		return err
	}
	vm.mu.Lock()
	defer vm.mu.Unlock()
	for id, slot := range devices {
		if slot >= 0 {
			vm.slots[slot] = id
		}
	}
	return nil
}

// devices asks QEMU which disks and NICs are plugged in, and in which slots; -1
// is none that we know.
func (vm *machine) devices(ctx context.Context) (map[string]int, error) {
	var list []struct {
		Name string `json:"name"`
	}
	if err := vm.call(ctx, "qom-list", object{"path": peripherals}, &list); err != nil {
		return nil, err
	}
	found := make(map[string]int)
	for _, d := range list {
		if !strings.HasPrefix(d.Name, diskID("")) && !strings.HasPrefix(d.Name, nicID("")) {
			continue
		}
		var bus string
		err := vm.call(ctx, "qom-get", object{"path": peripherals + "/" + d.Name, "property": "parent_bus"}, &bus)
		if isAnswer(err) {
			continue // unplugged meanwhile
		}
		if err != nil {
			return nil, err
		}
		found[d.Name] = -1
		for slot := range slots {
			if path.Base(bus) == slotName(slot) {
				found[d.Name] = slot
			}
		}
	}
	return found, nil
}
