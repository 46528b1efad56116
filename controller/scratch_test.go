// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// Where ext4's super block tells of project quotas.
const (
	ext4Super     = 1024
	ext4InodeSize = ext4Super + 0x58
	ext4ROCompat  = ext4Super + 0x64
	ext4PrjInode  = ext4Super + 0x26c
	ext4Quota     = 0x0100
	ext4Project   = 0x2000
)

// The guest accounts what containers write by project, if the disk can.
func TestScratchHasProjectQuotas(t *testing.T) {
	t.Parallel()
	s := newScratchStore(t.TempDir(), 64<<20)
	path := filepath.Join(t.TempDir(), "disk")
	require.NoError(t, s.make(t.Context(), path))
	st, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, s.size, st.Size())

	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	super := make([]byte, 2*ext4Super)
	_, err = f.ReadAt(super, 0)
	require.NoError(t, err)
	const both = ext4Quota | ext4Project
	require.EqualValues(t, both, binary.LittleEndian.Uint32(super[ext4ROCompat:])&both)
	require.NotZero(t, binary.LittleEndian.Uint32(super[ext4PrjInode:]), "the inode of the project quotas")
	require.EqualValues(t, 256, binary.LittleEndian.Uint16(super[ext4InodeSize:]))
}

// A template that an earlier version made in another way is not used.
func TestScratchTemplateOfAnotherVersion(t *testing.T) {
	t.Parallel()
	s := newScratchStore(t.TempDir(), 64<<20)
	old := filepath.Join(s.dir, "template-v1-67108864")
	require.NoError(t, os.MkdirAll(s.dir, 0o700))
	require.NoError(t, os.WriteFile(old, []byte("without quotas"), 0o600))
	path := filepath.Join(t.TempDir(), "disk")
	require.NoError(t, s.make(t.Context(), path))
	require.NotEqual(t, old, s.templatePath())
	st, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, s.size, st.Size())
}
