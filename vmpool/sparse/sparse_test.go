// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package sparse

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// image makes a sparse file with content at the places given.
func image(t *testing.T, size int64, parts map[int64][]byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	require.NoError(t, err)
	defer f.Close() //nolint:errcheck
	require.NoError(t, f.Truncate(size))
	for at, data := range parts {
		_, err := f.WriteAt(data, at)
		require.NoError(t, err)
	}
	return path
}

func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	require.NoError(t, unix.Stat(path, &st))
	return st.Blocks * 512
}

func TestCopyAndHash(t *testing.T) {
	t.Parallel()
	const size = 4<<30 + 1234
	data := bytes.Repeat([]byte("x"), 10000)
	from := image(t, size, map[int64][]byte{0: []byte("first"), 1<<20 + 17: data, 3 << 30: data, size - 5: []byte("last!")})
	to := filepath.Join(t.TempDir(), "copy")
	require.NoError(t, CopyFile(to, from))
	st, err := os.Stat(to)
	require.NoError(t, err)
	assert.Equal(t, int64(size), st.Size())
	assert.Less(t, allocated(t, to), int64(1<<20), "holes stay holes")
	one, err := Hash(from)
	require.NoError(t, err)
	two, err := Hash(to)
	require.NoError(t, err)
	assert.Equal(t, one, two)

	f, err := os.OpenFile(to, os.O_RDWR, 0)
	require.NoError(t, err)
	defer f.Close() //nolint:errcheck
	// Zeros that are written are no other content than a hole.
	_, err = f.WriteAt(make([]byte, 1<<20), 2<<30)
	require.NoError(t, err)
	same, err := Hash(to)
	require.NoError(t, err)
	assert.Equal(t, one, same)
	for name, change := range map[string]func() error{
		"a byte in data":  func() error { _, err := f.WriteAt([]byte("y"), 1<<20+500); return err },
		"a byte in holes": func() error { _, err := f.WriteAt([]byte{1}, 1<<30); return err },
		"its size":        func() error { return f.Truncate(size + 1) },
	} {
		require.NoError(t, change())
		other, err := Hash(to)
		require.NoError(t, err)
		assert.NotEqual(t, one, other, name)
	}
}

func TestCopyFileLeavesNothing(t *testing.T) {
	t.Parallel()
	to := filepath.Join(t.TempDir(), "copy")
	require.Error(t, CopyFile(to, filepath.Join(t.TempDir(), "missing")))
	assert.NoFileExists(t, to)
	require.NoError(t, os.WriteFile(to, []byte("mine"), 0o600))
	require.Error(t, CopyFile(to, image(t, 10, nil)))
	assert.FileExists(t, to, "what was there before stays")
}
