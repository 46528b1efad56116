// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package task

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
)

func TestSafeMounts(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	in := []specs.Mount{
		{Type: "mqueue", Destination: "/dev/mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Type: "sysfs", Destination: "/sys", Options: []string{"nosuid", "ro"}},
		{Type: "bind", Source: dir, Destination: "/d", Options: []string{"rbind", "noexec"}},
		{Type: "bind", Source: file, Destination: "/f", Options: []string{"rbind", "ro", "noexec"}},
		{Type: "bind", Source: "/none", Destination: "/n", Options: []string{"rbind"}},
	}
	got, err := safeMounts(in)
	require.NoError(t, err)
	require.Equal(t, []string{"nosuid", "noexec", "nodev", "rnosuid", "rnoexec", "rnodev"}, got[0].Options)
	require.Equal(t, []string{"rbind", "noexec", "rnoexec"}, got[2].Options)
	require.Equal(t, []string{"rbind", "noexec"}, in[2].Options)
	for _, i := range []int{1, 3, 4} {
		require.Equal(t, in[i], got[i])
	}
	_, err = safeMounts([]specs.Mount{{Type: "bind", Source: file, Destination: "/f", Options: []string{"rbind", "noexec"}}})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, `mount "/f"`)
	_, err = safeMounts([]specs.Mount{{Type: "bind", Source: "/none", Destination: "/n", Options: []string{"nodev"}}})
	require.ErrorIs(t, err, os.ErrNotExist)
}
