// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package durable

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

type value struct {
	A int `json:"a"`
}

func TestWhatIsWrittenIsRead(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "v.json")
	for i := range 3 {
		require.NoError(t, WriteJSON(path, value{A: i}))
		var got value
		require.NoError(t, ReadJSON(path, 100, &got))
		require.Equal(t, value{A: i}, got)
	}
	st, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), st.Mode())
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, entries, 1, "nothing else is left")
}

func TestAFailedWriteLeavesTheOldValue(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "v.json")
	require.NoError(t, WriteJSON(path, value{A: 1}))
	require.ErrorIs(t, WriteJSON(path, func() {}), errdefs.ErrInternal)
	var got value
	require.NoError(t, ReadJSON(path, 100, &got))
	require.Equal(t, value{A: 1}, got)
	require.Error(t, WriteJSON(filepath.Join(dir, "none", "v.json"), value{}))
	// The last step fails: what is in the way cannot be replaced.
	require.NoError(t, os.Mkdir(filepath.Join(dir, "d"), 0o700))
	require.Error(t, WriteJSON(filepath.Join(dir, "d"), value{}))
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, entries, 2, "nothing else is left")
}

func TestWhatCannotBeRead(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		make func(path string) error
		want error
	}{
		"none":      {func(string) error { return nil }, errdefs.ErrNotFound},
		"too long":  {func(p string) error { return os.WriteFile(p, []byte(`{"a":1}`+strings.Repeat(" ", 94)), 0o600) }, errdefs.ErrDataLoss},
		"empty":     {func(p string) error { return os.WriteFile(p, nil, 0o600) }, errdefs.ErrDataLoss},
		"cut off":   {func(p string) error { return os.WriteFile(p, []byte(`{"a":`), 0o600) }, errdefs.ErrDataLoss},
		"type":      {func(p string) error { return os.WriteFile(p, []byte(`{"a":"b"}`), 0o600) }, errdefs.ErrDataLoss},
		"symlink":   {func(p string) error { return os.Symlink("/proc/self/stat", p) }, errdefs.ErrDataLoss},
		"directory": {func(p string) error { return os.Mkdir(p, 0o700) }, errdefs.ErrDataLoss},
		"fifo":      {func(p string) error { return unix.Mkfifo(p, 0o600) }, errdefs.ErrDataLoss},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "v.json")
			require.NoError(t, tc.make(path))
			require.ErrorIs(t, ReadJSON(path, 100, &value{}), tc.want)
		})
	}
	path := filepath.Join(t.TempDir(), "v.json")
	require.NoError(t, os.WriteFile(path, []byte(`{"a":1}`+strings.Repeat(" ", 93)), 0o600))
	require.NoError(t, ReadJSON(path, 100, &value{}), "as long as may be")
}
