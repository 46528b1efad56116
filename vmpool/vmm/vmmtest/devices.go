// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmmtest

import (
	"os"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// blockDevices plugs devices of the host's, of which no node changes, also of two VMs at
// once.
func (s *Suite) blockDevices(t *testing.T) {
	large, _ := LoopDevice(t, 8<<20, 4096, false)
	fixed, _ := LoopDevice(t, 1<<20, 512, true)
	before := nodeOf(t, large)
	ctx := s.ctx(t)
	disks := []vmm.Disk{
		{Serial: "dev-1", Path: large}, {Serial: "dev-1-r", Path: large, ReadOnly: true}, {Serial: "dev-2", Path: fixed, ReadOnly: true},
	}
	for range 2 {
		vm := s.boot(t)
		s.dialOnce(ctx, t, vm)
		for _, disk := range disks {
			serial, err := vm.AddDisk(ctx, disk)
			require.NoError(t, err, disk.Serial)
			require.Equal(t, disk.Serial, serial, "a device is as large as it is")
		}
		require.NoError(t, vm.RemoveDisk(ctx, "dev-1"))
		_, err := vm.AddDisk(ctx, vmm.Disk{Serial: "dev-4", Path: os.DevNull})
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	}
	require.Equal(t, before, nodeOf(t, large))
}

// nodeOf is a device's node: mode, owner, group, number.
func nodeOf(t *testing.T, path string) [4]uint64 {
	t.Helper()
	var st unix.Stat_t
	require.NoError(t, unix.Stat(path, &st))
	return [4]uint64{uint64(st.Mode), uint64(st.Uid), uint64(st.Gid), st.Rdev}
}
