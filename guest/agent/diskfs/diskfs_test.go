// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package diskfs

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/disk"
)

// device makes a loop device with a file system, which goes with the test.
func device(t *testing.T, readOnly bool, mkfs ...string) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root mounts")
	}
	file := filepath.Join(t.TempDir(), "disk")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	require.NoError(t, os.Truncate(file, 16<<20))
	out, err := exec.Command(mkfs[0], append(mkfs[1:], file)...).CombinedOutput()
	if err != nil {
		t.Skipf("%q: %v %s", mkfs, err, out)
	}
	args := []string{"--find", "--show", file}
	if readOnly {
		args = append(args, "--read-only")
	}
	node, err := exec.Command("losetup", args...).Output()
	if err != nil {
		t.Skipf("no loop device: %v", err)
	}
	name := string(node[:len(node)-1])
	t.Cleanup(func() { require.NoError(t, exec.Command("losetup", "--detach", name).Run()) })
	return name
}

// manager knows a disk by a serial.
func manager(t *testing.T, disks map[string]string) *Manager {
	t.Helper()
	sys := t.TempDir()
	for serial, node := range disks {
		dir := filepath.Join(sys, "block", filepath.Base(node))
		require.NoError(t, os.MkdirAll(dir, 0o700))
		require.NoError(t, os.WriteFile(filepath.Join(dir, "serial"), []byte(serial), 0o600))
	}
	m := NewManager(filepath.Join(t.TempDir(), "disks"), disk.Finder{Sys: sys, Dev: "/dev"})
	t.Cleanup(func() { require.NoError(t, m.Close(context.Background())) })
	return m
}

func ext4(t *testing.T) string {
	t.Helper()
	return device(t, false, "mkfs.ext4", "-q", "-F")
}

// isFree tells whether no mount has a disk.
func isFree(t *testing.T, node string) bool {
	t.Helper()
	f, err := os.OpenFile(node, os.O_RDONLY|unix.O_EXCL, 0)
	if err != nil {
		require.ErrorIs(t, err, unix.EBUSY)
		return false
	}
	require.NoError(t, f.Close())
	return true
}

// A file system is mounted once, for all users, and unmounted when the last has gone.
func TestUsers(t *testing.T) {
	t.Parallel()
	node := ext4(t)
	m := manager(t, map[string]string{"vol": node})
	ctx, v, bundles := t.Context(), Volume{Serial: "vol", FSType: "ext4", Options: []string{"noatime"}}, t.TempDir()
	require.NoError(t, m.Release(ctx, "nobody"))
	require.ErrorIs(t, m.Bind("a", "vol", "", bundles+"/x", nil), errdefs.ErrInvalidArgument)
	for _, user := range []string{"a", "a", "b"} {
		require.NoError(t, m.Use(ctx, user, v))
	}
	require.NoError(t, m.Bind("a", "vol", "", bundles+"/a", nil))
	require.NoError(t, m.Bind("b", "vol", "", bundles+"/b/0", nil))
	require.NoError(t, os.WriteFile(bundles+"/a/file", []byte("shared"), 0o644))
	require.NoError(t, m.Bind("b", "vol", "file", bundles+"/b/1", nil))
	for _, path := range []string{"/b/0/file", "/b/1"} {
		text, err := os.ReadFile(bundles + path)
		require.NoError(t, err)
		require.Equal(t, "shared", string(text))
	}
	var st unix.Statfs_t
	require.NoError(t, unix.Statfs(bundles+"/a", &st))
	require.NotZero(t, st.Flags&unix.MS_NODEV)
	require.NotZero(t, st.Flags&unix.MS_NOATIME)
	other := v
	other.ReadOnly = true
	require.ErrorIs(t, m.Use(ctx, "c", other), errdefs.ErrInvalidArgument)

	require.NoError(t, m.Release(ctx, "a"))
	require.NoFileExists(t, bundles+"/a/file")
	require.FileExists(t, bundles+"/b/0/file")
	require.False(t, isFree(t, node))
	for range 2 {
		require.NoError(t, m.Release(ctx, "b"))
		require.True(t, isFree(t, node))
	}
	require.NoDirExists(t, m.target("vol"))
	require.NoError(t, m.Use(ctx, "c", other), "another time it may be another way")
	require.NoError(t, m.Bind("c", "vol", "/file", bundles+"/c", nil))
	require.Error(t, os.WriteFile(bundles+"/c", nil, 0o600))
	require.NoError(t, m.Close(ctx))
	require.True(t, isFree(t, node))
}

// Nothing in a volume leads out of it.
func TestBindEscapes(t *testing.T) {
	t.Parallel()
	m := manager(t, map[string]string{"vol": ext4(t)})
	top := t.TempDir()
	require.NoError(t, m.Use(t.Context(), "a", Volume{Serial: "vol", FSType: "ext4"}))
	require.NoError(t, m.Bind("a", "vol", "", top+"/all", nil))
	require.NoError(t, os.MkdirAll(top+"/all/etc/own", 0o755))
	for name, to := range map[string]string{"up": "../../../../../etc", "abs": "/etc", "out": "/proc/self/fd", "loop": "loop"} {
		require.NoError(t, os.Symlink(to, top+"/all/"+name))
	}
	for _, path := range []string{"up", "abs", "../../../etc", "abs/../etc"} {
		target := filepath.Join(top, "of", path)
		require.NoError(t, m.Bind("a", "vol", path, target, nil), path)
		require.DirExists(t, target+"/own", "%s is the volume's own", path)
	}
	for _, path := range []string{"out", "loop", "none", "none/etc"} {
		require.Error(t, m.Bind("a", "vol", path, top+"/no", nil), path)
	}
	require.NoError(t, unix.Mkfifo(top+"/all/fifo", 0o600))
	require.ErrorIs(t, m.Bind("a", "vol", "fifo", top+"/no", nil), errdefs.ErrInvalidArgument)
	require.NoFileExists(t, top+"/no")
}

func TestRefused(t *testing.T) {
	t.Parallel()
	node, fixed := ext4(t), device(t, true, "mkfs.ext4", "-q", "-F")
	m := manager(t, map[string]string{"vol": node, "fixed": fixed})
	for name, v := range map[string]Volume{
		"another type":        {Serial: "vol", FSType: "xfs"},
		"a type of none":      {Serial: "vol", FSType: "proc"},
		"no serial":           {Serial: "../vol", FSType: "ext4"},
		"an option of none":   {Serial: "vol", FSType: "ext4", Options: []string{"dev"}},
		"an option of erofs'": {Serial: "vol", FSType: "erofs", Options: []string{"discard"}},
	} {
		require.ErrorIs(t, m.Use(t.Context(), "a", v), errdefs.ErrInvalidArgument, name)
		require.True(t, isFree(t, node), name)
	}
	require.Error(t, m.Use(t.Context(), "a", Volume{Serial: "fixed", FSType: "ext4"}), "it cannot be written to")
	require.NoError(t, m.Use(t.Context(), "a", Volume{Serial: "fixed", FSType: "ext4", ReadOnly: true}))
}
