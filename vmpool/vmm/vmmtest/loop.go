// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmmtest

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// LoopDevice makes a block device of a sparse file of so many bytes, with blocks of so
// many, and returns a node of it and the file's path. It goes with the test, which is
// skipped where there are no loop devices to be had.
func LoopDevice(t *testing.T, bytes int64, blockSize uint32, readOnly bool) (node, file string) {
	t.Helper()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("no loop devices: %v", err)
	}
	defer control.Close() //nolint:errcheck // nothing is buffered
	file = filepath.Join(t.TempDir(), "device")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	require.NoError(t, os.Truncate(file, bytes))
	backing, err := os.OpenFile(file, os.O_RDWR, 0)
	require.NoError(t, err)
	defer backing.Close() //nolint:errcheck // the device has its own
	config := unix.LoopConfig{Fd: uint32(backing.Fd()), Size: blockSize}
	if readOnly {
		config.Info.Flags = unix.LO_FLAGS_READ_ONLY
	}
	for {
		free, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		require.NoError(t, err)
		node = "/dev/loop" + strconv.Itoa(free)
		device, err := os.OpenFile(node, os.O_RDWR, 0)
		require.NoError(t, err)
		err = unix.IoctlLoopConfigure(int(device.Fd()), &config)
		if errors.Is(err, unix.EBUSY) { // somebody else was first
			require.NoError(t, device.Close())
			continue
		}
		require.NoError(t, err)
		t.Cleanup(func() {
			// It ends with its last user.
			require.NoError(t, unix.IoctlSetInt(int(device.Fd()), unix.LOOP_CLR_FD, 0))
			require.NoError(t, device.Close())
		})
		return node, file
	}
}
