// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package qemu

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmmtest"
)

// QEMU is told what a disk is, and of a device the sizes of its blocks.
func TestBlockDevice(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	device, _ := vmmtest.LoopDevice(t, 1<<20, 4096, true)
	for path, want := range map[string]struct {
		driver string
		sizes  object
	}{
		file:       {"file", object{}},
		device:     {"host_device", object{"logical_block_size": 4096, "physical_block_size": 4096}},
		os.DevNull: {"", object{}},
	} {
		f, err := os.Open(path)
		require.NoError(t, err)
		driver, err := driverOf(f)
		require.NoError(t, f.Close())
		require.Equal(t, want.driver, driver)
		if want.driver == "" {
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		}
		sizes := object{}
		require.NoError(t, setBlockSizes(sizes, path))
		require.Equal(t, want.sizes, sizes)
	}
}
