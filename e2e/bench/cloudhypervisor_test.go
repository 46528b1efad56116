// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// What a process has mapped or open is found by the end of its path.
func TestFilesOfProcess(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "of a process")
	require.NoError(t, os.WriteFile(path, make([]byte, 4096), 0o600))
	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	got, err := opened(os.Getpid(), "/of a process")
	require.NoError(t, err)
	assert.Equal(t, path, got)
	_, err = mapped(os.Getpid(), "/of a process")
	require.ErrorIs(t, err, errdefs.ErrNotFound)

	data, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ, unix.MAP_PRIVATE)
	require.NoError(t, err)
	defer unix.Munmap(data)
	got, err = mapped(os.Getpid(), "/of a process")
	require.NoError(t, err)
	assert.Equal(t, path, got)
	_, err = opened(os.Getpid(), "/of nobody")
	require.ErrorIs(t, err, errdefs.ErrNotFound)
}
