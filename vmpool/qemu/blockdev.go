// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package qemu

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// driverOf is what QEMU opens a disk by: it wants to be told files from block devices.
func driverOf(f *os.File) (string, error) {
	info, err := f.Stat()
	switch {
	case err != nil:
		return "", err
	case info.Mode().IsRegular():
		return "file", nil
	case isBlockDevice(info):
		return "host_device", nil
	default:
		return "", fmt.Errorf("%s is neither a file nor a block device: %w", f.Name(), errdefs.ErrInvalidArgument)
	}
}

func isBlockDevice(info fs.FileInfo) bool {
	return info.Mode()&fs.ModeType == fs.ModeDevice
}

// setBlockSizes gives a disk's device the sizes of blocks that the host's has, if it is
// one: what is on it, such as a table of partitions, goes by them.
func setBlockSizes(device object, path string) error {
	info, err := os.Stat(path)
	if err != nil || !isBlockDevice(info) {
		return nil // who opens it tells
	}
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	defer f.Close() //nolint:errcheck // only read
	logical, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKSSZGET)
	physical, pErr := unix.IoctlGetUint32(int(f.Fd()), unix.BLKPBSZGET)
	if err := errors.Join(err, pErr); err != nil {
		return fmt.Errorf("ask for the sizes of blocks: %w", err)
	}
	device["logical_block_size"] = logical
	device["physical_block_size"] = max(logical, int(physical))
	return nil
}
