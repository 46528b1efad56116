// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package snapshot

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// FuzzManifest reads any file as a snapshot's manifest: it is a snapshot only if it is the
// one that was asked for, of files in its own directory that are as they were written.
func FuzzManifest(f *testing.F) {
	dir := f.TempDir()
	for _, name := range []string{MemoryFile, ScratchFile} {
		require.NoError(f, os.WriteFile(filepath.Join(dir, name), []byte(name), 0o600))
	}
	in := Inputs{Format: Format}
	require.NoError(f, seal(dir, in, vmm.Snapshot{Driver: "qemu"}))
	good, err := os.ReadFile(filepath.Join(dir, manifestFile))
	require.NoError(f, err)
	f.Add(good)
	f.Add([]byte(strings.ReplaceAll(string(good), MemoryFile, "../../etc/passwd")))
	f.Add([]byte(strings.ReplaceAll(string(good), `"sha256":"`, `"sha256":"0`)))
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, manifestFile), data, 0o600))
		snap, err := load(dir, in.Key())
		if err != nil {
			return
		}
		for path := range snap.stamps {
			require.Equal(t, dir, filepath.Dir(path))
		}
		require.Equal(t, dir, snap.VMM.Dir)
		require.NoError(t, snap.unchanged())
		var m manifest
		require.NoError(t, json.Unmarshal(data, &m))
		require.Contains(t, m.Files, MemoryFile)
	})
}

// FuzzCPU reads any text as /proc/cpuinfo.
func FuzzCPU(f *testing.F) {
	f.Add("processor\t: 0\nmodel name\t: M\nflags\t\t: b a\n\nprocessor\t: 1\n")
	f.Add(strings.Repeat("x", 1<<16))
	f.Fuzz(func(t *testing.T, text string) {
		name, err := parseCPU(strings.NewReader(text))
		if err == nil {
			require.GreaterOrEqual(t, len(name), 16)
		}
	})
}
