// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// The image disk is there from the start: the guest need not find a device when the
// image is known, which costs its ACPI interpreter much of an emulated processor. QEMU
// puts another file under it. The guest goes on to see the capacity that it had.
const (
	// imageNode is the disk's node, whose file is exchanged for another node's.
	imageNode = "image"
	// noImage is the node below it when it is empty: it reads as zeros.
	noImage = "no-image"
	// imagePrefix begins the name of an image's node, which ends with its serial.
	imagePrefix = "image-"
	// imageCapacity is the capacity that the guest sees, in bytes. A larger image is
	// hot-plugged.
	imageCapacity = 1 << 40
	// imageUnit is what an image's size must be a multiple of: beyond its end nothing
	// can be read, and guests read whole pages.
	imageUnit = 4096
)

// imageArgs give the machine its image disk.
func imageArgs() []string {
	return []string{
		"-blockdev", fmt.Sprintf("driver=null-co,node-name=%s,read-zeroes=on,read-only=on,size=%d", noImage, int64(imageCapacity)),
		"-blockdev", fmt.Sprintf("driver=raw,node-name=%s,read-only=on,file=%s", imageNode, noImage),
		"-device", fmt.Sprintf("virtio-blk-pci,drive=%s,serial=%s,werror=report,rerror=report", imageNode, vmm.ImageSerial) + modern,
	}
}

// fitsImageDisk tells whether a disk can be the content of the image disk.
func fitsImageDisk(disk vmm.Disk) bool {
	info, err := os.Stat(disk.Path)
	return err == nil && disk.ReadOnly && info.Mode().IsRegular() && info.Size() <= imageCapacity && info.Size()%imageUnit == 0
}

// hasImageDisk tells whether the machine has an image disk.
func (vm *machine) hasImageDisk() bool {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return vm.own.ImageDisk
}

// putImage makes a disk the content of the image disk. It returns false if there is
// none, if that has another, or if the disk is hot-plugged.
func (vm *machine) putImage(ctx context.Context, disk vmm.Disk) (bool, error) {
	if !vm.hasImageDisk() {
		return false, nil
	}
	unlock, err := vm.Lock(ctx, imageNode)
	if err != nil {
		return false, err
	}
	defer unlock()
	if vm.hasSlot(diskID(disk.Serial)) {
		return false, nil
	}
	there, err := vm.imageThere(ctx)
	switch {
	case err != nil:
		return false, err
	case there == disk.Serial:
		return false, fmt.Errorf("it is there: %w", errdefs.ErrAlreadyExists)
	case there != "":
		return false, nil
	}
	// Until it is known how this ended.
	vm.setImage("", true)
	node := imagePrefix + disk.Serial
	err = vm.withFile(ctx, disk, func(file object) error {
		file["node-name"], file["read-only"] = node, true
		return vm.call(ctx, "blockdev-add", file, nil)
	})
	if err == nil {
		err = vm.exchangeImage(ctx, node)
	}
	if err != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoStep)
		defer cancel()
		if undoErr := vm.emptyImage(ctx, disk.Serial); !errdefs.IsUnavailable(undoErr) {
			err = errors.Join(err, undoErr)
		}
		return false, err
	}
	vm.setImage(disk.Serial, false)
	return true, nil
}

// takeImage empties the image disk if a disk is its content.
func (vm *machine) takeImage(ctx context.Context, serial string) (bool, error) {
	if !vm.hasImageDisk() {
		return false, nil
	}
	unlock, err := vm.Lock(ctx, imageNode)
	if err != nil {
		return false, err
	}
	defer unlock()
	there, err := vm.imageThere(ctx)
	if err != nil || there != serial {
		return false, err
	}
	vm.setImage(serial, true)
	return true, vm.emptyImage(ctx, serial)
}

// emptyImage takes an image's node out of the image disk, where it may be, and removes
// it, where there is one.
func (vm *machine) emptyImage(ctx context.Context, serial string) error {
	if err := vm.exchangeImage(ctx, noImage); err != nil {
		return err
	}
	node := imagePrefix + serial
	err := vm.call(ctx, "blockdev-del", object{"node-name": node}, nil)
	if isAnswer(err) && !vm.hasNode(ctx, node) {
		err = nil
	}
	if err == nil {
		vm.setImage("", false)
	}
	return err
}

// exchangeImage puts a node under the image disk. What the guest has asked for is
// answered before.
func (vm *machine) exchangeImage(ctx context.Context, node string) error {
	args := object{"driver": "raw", "node-name": imageNode, "read-only": true, "file": node}
	return vm.call(ctx, "blockdev-reopen", object{"options": []object{args}}, nil)
}

// imageThere is the serial of the disk that is the image disk's content, or nothing.
// Where that is in doubt QEMU is asked: it does not remove a node that is in use.
func (vm *machine) imageThere(ctx context.Context) (string, error) {
	vm.mu.Lock()
	there, doubt := vm.image, vm.imageDoubt
	vm.mu.Unlock()
	if !doubt {
		return there, nil
	}
	nodes, err := vm.nodes(ctx)
	if err != nil {
		return "", err
	}
	there = ""
	for _, node := range nodes {
		serial, ok := strings.CutPrefix(node, imagePrefix)
		if !ok {
			continue
		}
		err := vm.call(ctx, "blockdev-del", object{"node-name": node}, nil)
		if isAnswer(err) {
			there = serial
		} else if err != nil {
			return "", err
		}
	}
	vm.setImage(there, false)
	return there, nil
}

func (vm *machine) setImage(serial string, doubt bool) {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	vm.image, vm.imageDoubt = serial, doubt
}
