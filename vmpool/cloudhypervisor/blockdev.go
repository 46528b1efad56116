// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package cloudhypervisor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// deviceOf tells about a block device; it is nil for what is none.
func deviceOf(path string) (*unix.Stat_t, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return nil, nil
	}
	return &st, nil
}

// lendDevice gives the hypervisor a node of its own of a block device of the host's, whose
// node stays as it is. Its user can open it as it may, and change nothing of it.
func (vm *machine) lendDevice(path string, readOnly bool, device uint64) (retErr error) {
	if ended := vm.Check(); ended != nil {
		return ended
	}
	dir := filepath.Dir(path)
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	if fs.Flags&unix.MS_NODEV != 0 {
		return fmt.Errorf("%s is on a file system that is mounted with nodev, by which a confined hypervisor can open no block device: %w",
			dir, errdefs.ErrFailedPrecondition)
	}
	mode := uint32(0o600)
	if readOnly {
		mode = 0o400
	}
	if err := unix.Mknod(path, unix.S_IFBLK|mode, int(device)); err != nil {
		return fmt.Errorf("make a node of the block device: %w", err)
	}
	defer func() {
		if retErr != nil {
			retErr = errors.Join(retErr, os.Remove(path))
		}
	}()
	return os.Chown(path, int(vm.State().UID), int(vm.State().UID))
}
