// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package prebuild

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// FuzzMemory reads any file as what was remembered: within its bounds, or nothing.
func FuzzMemory(f *testing.F) {
	f.Add([]byte(`{"version":1,"used":[{"namespace":"k8s.io","repository":"r","at":"2026-01-01T00:00:00Z"}],"pending":[{"name":"n"}]}`))
	f.Add([]byte(`{"version":2}`))
	f.Add([]byte(`[`))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, memoryFile), data, 0o600))
		m, err := openMemory(dir)
		require.NotNil(t, m)
		require.LessOrEqual(t, len(m.Used), maxUsed)
		require.LessOrEqual(t, len(m.Pending), maxPending)
		if err == nil {
			m.remember(use{Repository: "another"})
			require.NoError(t, m.save())
		}
	})
}
