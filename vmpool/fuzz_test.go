// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmpool

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

// FuzzRecord reads any file as the record of a VM: it is that VM's, or refused as damaged.
func FuzzRecord(f *testing.F) {
	f.Add([]byte(`{"version":1,"id":"vm1","ready":true,"vm":{"driver":"qemu","pid":1,"data":{"size":{}}}}`))
	f.Add([]byte(`{"version":1,"id":"../vm1"}`))
	f.Add([]byte(`{"version":1,"id":"vm1","vm":{"data":`))
	dir := filepath.Join(f.TempDir(), "vm1")
	require.NoError(f, os.Mkdir(dir, 0o700))
	f.Fuzz(func(t *testing.T, data []byte) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, recordFile), data, 0o600))
		r, err := loadRecord(dir)
		if err != nil {
			require.ErrorIs(t, err, errdefs.ErrDataLoss)
			return
		}
		require.Equal(t, "vm1", r.ID)
		require.NoError(t, r.save(dir))
		_, err = loadRecord(dir)
		require.NoError(t, err)
	})
}
