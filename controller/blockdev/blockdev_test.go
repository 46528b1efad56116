// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package blockdev

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmmtest"
)

func newNodes(t *testing.T) *Nodes {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("nodes of devices are root's to make")
	}
	n := NewNodes(filepath.Join(t.TempDir(), "devices"))
	t.Cleanup(func() {
		left, err := filepath.Glob(n.dir + "/*")
		require.NoError(t, err)
		require.Empty(t, left)
	})
	return n
}

func numberAt(t *testing.T, path string) Number {
	t.Helper()
	var st unix.Stat_t
	require.NoError(t, unix.Stat(path, &st))
	require.EqualValues(t, unix.S_IFBLK, st.Mode&unix.S_IFMT)
	return Number{unix.Major(st.Rdev), unix.Minor(st.Rdev)}
}

func TestOpen(t *testing.T) {
	t.Parallel()
	nodes := newNodes(t)
	for _, readOnly := range []bool{false, true} {
		device, _ := vmmtest.LoopDevice(t, 1<<20, 512, readOnly)
		number := numberAt(t, device)
		s, err := nodes.Open(number)
		require.NoError(t, err)
		require.Equal(t, readOnly, s.ReadOnly)
		require.Equal(t, number, numberAt(t, s.Path))
		require.NoError(t, s.InUse())
		claim, err := os.OpenFile(device, os.O_RDONLY|unix.O_EXCL, 0)
		require.NoError(t, err)
		err = s.InUse()
		require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
		require.ErrorContains(t, err, number.String()+" is in use on the host")
		require.NoError(t, claim.Close())
		require.NoError(t, s.Close())
		require.NoFileExists(t, s.Path)
	}
	for number, want := range map[Number]string{
		{MaxMajor, MaxMinor}:  "the host has no such device",
		{MaxMajor + 1, 0}:     "want numbers up to 4095:1048575",
		{Minor: MaxMinor + 1}: "want numbers up to",
	} {
		_, err := nodes.Open(number)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		require.ErrorContains(t, err, want)
		require.ErrorContains(t, err, number.String())
	}
}

// What an earlier process left goes, and where nodes are of no use that is said.
func TestNodes(t *testing.T) {
	t.Parallel()
	nodes := newNodes(t)
	device, _ := vmmtest.LoopDevice(t, 1<<20, 512, false)
	s, err := nodes.Open(numberAt(t, device))
	require.NoError(t, err)
	require.NoError(t, nodes.Clear())
	require.NoFileExists(t, s.Path)
	require.NoError(t, nodes.Clear())

	require.NoError(t, unix.Mount("nodev", nodes.dir, "tmpfs", unix.MS_NODEV, ""))
	defer func() { require.NoError(t, unix.Unmount(nodes.dir, 0)) }()
	_, err = nodes.Open(numberAt(t, device))
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.ErrorContains(t, err, nodes.dir+" is on a file system that is mounted with nodev")
}

func TestFind(t *testing.T) {
	t.Parallel()
	nodes := newNodes(t)
	dir, err := filepath.EvalSymlinks(t.TempDir())
	require.NoError(t, err)
	image, link, small := filepath.Join(dir, "image"), filepath.Join(dir, "link"), filepath.Join(dir, "small")
	require.NoError(t, os.WriteFile(image, make([]byte, 64<<10), 0o600))
	require.NoError(t, os.WriteFile(small, make([]byte, 513), 0o600))
	require.NoError(t, os.Symlink("image", link))
	device, _ := vmmtest.LoopDevice(t, 1<<20, 512, false)

	a, err := Find(image)
	require.NoError(t, err)
	b, err := Find(link)
	require.NoError(t, err)
	c, err := Find(device)
	require.NoError(t, err)
	defer func() {
		for _, f := range []*Found{a, b, c} {
			require.NoError(t, f.Close())
		}
	}()
	require.Equal(t, []any{image, false, a.Identity()}, []any{b.Path, b.Device, b.Identity()})
	require.Equal(t, []any{device, true, "device " + numberAt(t, device).String()}, []any{c.Path, c.Device, c.Identity()})
	s, err := c.Source(nodes, true)
	require.NoError(t, err)
	require.Equal(t, numberAt(t, device), s.Number)
	require.NoError(t, s.Close())

	_, err = Find(filepath.Join(dir, "none"))
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	for path, want := range map[string]string{dir: "no block device and no regular file", os.DevNull: "no block device", small: "the file has 513 bytes"} {
		_, err := Find(path)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		require.ErrorContains(t, err, want)
	}

	// What was found stays so, whatever comes to have its name.
	require.NoError(t, os.Rename(image, image+"2"))
	require.NoError(t, os.WriteFile(image, make([]byte, 32<<10), 0o600))
	requireLoop(t, nodes, a, 64<<10)
}

// requireLoop checks that a file becomes a device as large, which goes with its last user.
func requireLoop(t *testing.T, nodes *Nodes, f *Found, size int64) {
	t.Helper()
	for _, readOnly := range []bool{false, true} {
		s, err := f.Source(nodes, readOnly)
		require.NoError(t, err)
		mode := os.O_RDWR
		if readOnly {
			mode = os.O_RDONLY
		}
		user, err := os.OpenFile(s.Path, mode, 0)
		require.NoError(t, err)
		require.NoError(t, s.Close())
		require.NoFileExists(t, s.Path)
		got, err := user.Seek(0, 2)
		require.NoError(t, err)
		require.Equal(t, size, got)
		if !readOnly {
			_, err = user.WriteAt([]byte("by the device"), 512)
			require.NoError(t, err)
			require.NoError(t, user.Sync())
			text, err := os.ReadFile(f.self())
			require.NoError(t, err)
			require.Equal(t, "by the device", string(text[512:525]))
		}
		// Whoever else may use the same number afterwards, its file is another one.
		status, err := unix.IoctlLoopGetStatus64(int(user.Fd()))
		require.NoError(t, err)
		require.Equal(t, f.ino, status.Inode)
		require.NotZero(t, status.Flags&unix.LO_FLAGS_AUTOCLEAR)
		require.Equal(t, readOnly, status.Flags&unix.LO_FLAGS_READ_ONLY != 0)
		require.NoError(t, user.Close())
	}
}
