// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package qemu

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// lock keeps calls about one device apart. The caller calls the function that it
// returns.
func (vm *machine) lock(ctx context.Context, id string) (unlock func(), _ error) {
	for {
		vm.mu.Lock()
		other := vm.busy[id]
		if other == nil {
			mine := make(chan struct{})
			vm.busy[id] = mine
			vm.mu.Unlock()
			return func() {
				vm.mu.Lock()
				delete(vm.busy, id)
				vm.mu.Unlock()
				close(mine)
			}, nil
		}
		vm.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// claim is lock for a device that must not exist yet, with a slot for it. The
// caller calls the function that it returns, with what came of it.
func (vm *machine) claim(ctx context.Context, id string) (release func(error), _ error) {
	unlock, err := vm.lock(ctx, id)
	if err != nil {
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
		if err == nil {
			return
		}
		vm.freeSlot(id)
		if !isAnswer(err) {
			// The device may have come to be after all.
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoStep)
			defer cancel()
			_ = vm.findSlots(ctx)
		}
	}, nil
}

// slotOf is the name of the slot that claim gave to a device.
func (vm *machine) slotOf(id string) string {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return slotName(slices.Index(vm.slots[:], id))
}

func (vm *machine) freeSlot(id string) {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if slot := slices.Index(vm.slots[:], id); slot >= 0 {
		vm.slots[slot] = ""
	}
}

// findSlots asks QEMU which devices are in which slots.
func (vm *machine) findSlots(ctx context.Context) error {
	var devices []struct {
		Name string `json:"name"`
	}
	if err := vm.call(ctx, "qom-list", object{"path": peripherals}, &devices); err != nil {
		return err
	}
	for _, d := range devices {
		if !strings.HasPrefix(d.Name, diskID("")) && !strings.HasPrefix(d.Name, nicID("")) {
			continue
		}
		var bus string
		err := vm.call(ctx, "qom-get", object{"path": peripherals + "/" + d.Name, "property": "parent_bus"}, &bus)
		if isAnswer(err) {
			continue // unplugged meanwhile
		}
		if err != nil {
			return err
		}
		for slot := range slots {
			if path.Base(bus) == slotName(slot) {
				vm.mu.Lock()
				vm.slots[slot] = d.Name
				vm.mu.Unlock()
			}
		}
	}
	return nil
}
