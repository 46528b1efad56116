// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package rootfs

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/disk"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/pause"
)

// serial of the fake disk.
const serial = "image"

// loopDevice makes a file a disk.
func loopDevice(t *testing.T, file string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "losetup", "--find", "--show", "--read-only", file).Output()
	if err != nil {
		t.Skipf("needs a loop device: %v", err)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		require.NoError(t, exec.CommandContext(context.Background(), "losetup", "--detach", dev).Run())
	})
	return dev
}

// newTest makes a manager whose one disk is an erofs image.
func newTest(t *testing.T) (*Manager, string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	mkfs, err := exec.LookPath("mkfs.erofs")
	if err != nil {
		t.Skipf("needs mkfs.erofs: %v", err)
	}
	dir := t.TempDir()
	// Overlay's upper layer must not lie on an overlay: a tmpfs will do.
	require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, ""))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	root := filepath.Join(dir, "tree")
	require.NoError(t, os.MkdirAll(filepath.Join(root, "etc"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(root, "etc/name"), []byte("image"), 0o644))
	require.NoError(t, os.Chmod(root, 0o751))
	// The image itself may not lie on a tmpfs.
	image := filepath.Join(t.TempDir(), "image.erofs")
	out, err := exec.CommandContext(t.Context(), mkfs, image, root).CombinedOutput()
	require.NoError(t, err, "%s", out)
	sys, dev := filepath.Join(dir, "sys"), filepath.Join(dir, "dev")
	require.NoError(t, os.MkdirAll(filepath.Join(sys, "block/vdb"), 0o755))
	require.NoError(t, os.Mkdir(dev, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(sys, "block/vdb/serial"), []byte(serial), 0o644))
	require.NoError(t, os.Symlink(loopDevice(t, image), filepath.Join(dev, "vdb")))
	m, err := NewManager(Config{Images: filepath.Join(dir, "images"), Layers: filepath.Join(dir, "layers"), Disks: disk.Finder{Sys: sys, Dev: dev}})
	require.NoError(t, err)
	t.Cleanup(func() {
		_ = unix.Unmount(filepath.Join(dir, "images", serial), unix.MNT_DETACH)
	})
	return m, dir
}

func (m *Manager) mountTest(t *testing.T, dir, id string) (*Layer, string) {
	t.Helper()
	target := filepath.Join(dir, "c", id)
	require.NoError(t, os.MkdirAll(target, 0o755))
	l, err := m.Mount(t.Context(), id, serial, target, nil)
	if err != nil && !mountable(err) {
		t.Skipf("the kernel does not mount erofs from a file: %v", err)
	}
	require.NoError(t, err)
	return l, target
}

func mountable(err error) bool {
	return !errdefs.IsUnknown(errdefs.Resolve(err)) || err == nil
}

func TestMount(t *testing.T) {
	m, dir := newTest(t)
	a, rootA := m.mountTest(t, dir, "a")
	b, rootB := m.mountTest(t, dir, "b")
	info, err := os.Stat(rootA)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o751), info.Mode().Perm())
	require.NoError(t, os.WriteFile(filepath.Join(rootA, "etc/name"), []byte("changed"), 0o644))
	got, err := os.ReadFile(filepath.Join(rootB, "etc/name"))
	require.NoError(t, err)
	require.Equal(t, "image", string(got))

	u, err := a.Usage()
	require.NoError(t, err)
	require.NotZero(t, u.Bytes)
	require.EqualValues(t, 2, u.Inodes) // etc, etc/name

	// A layer that exists is not taken over.
	_, err = m.Mount(t.Context(), "a", serial, rootB, nil)
	require.ErrorIs(t, err, os.ErrExist)

	for _, l := range []*Layer{a, b} {
		require.NoError(t, l.Remove())
		require.NoError(t, l.Remove())
	}
	require.NoFileExists(t, filepath.Join(rootA, "etc/name"))
	layers := filepath.Join(dir, "layers")
	require.Eventually(t, func() bool {
		left, err := filepath.Glob(filepath.Join(layers, "*", "*"))
		return err == nil && len(left) == 0
	}, 10*time.Second, time.Millisecond)
	_, again := m.mountTest(t, dir, "a")
	require.NoError(t, unix.Unmount(again, 0))
}

// TestMountMapped looks at the owners in a user namespace's root file system.
func TestMountMapped(t *testing.T) {
	m, dir := newTest(t)
	const firstUser, firstGroup = 131072, 262144
	pid, err := pause.Start("/proc/self/exe", &pause.IDs{UID: firstUser, UIDs: 10, GID: firstGroup, GIDs: 10})
	require.NoError(t, err)
	defer func() {
		_ = unix.Kill(pid, unix.SIGKILL)
		_, _ = unix.Wait4(pid, nil, 0, nil)
	}()
	userns, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", pid))
	require.NoError(t, err)
	defer userns.Close()
	require.NoError(t, m.Image(t.Context(), serial, userns))
	require.NoError(t, m.Image(t.Context(), serial, userns))
	target := filepath.Join(dir, "c", "a")
	require.NoError(t, os.MkdirAll(target, 0o755))
	l, err := m.Mount(t.Context(), "a", serial, target, userns)
	require.NoError(t, err)
	owner := func(path string) string {
		var st unix.Stat_t
		require.NoError(t, unix.Stat(path, &st))
		return fmt.Sprint(st.Uid, ":", st.Gid)
	}
	roots := fmt.Sprint(firstUser, ":", firstGroup)
	for _, path := range []string{"", "etc", "etc/name"} {
		require.Equal(t, roots, owner(filepath.Join(target, path)), path)
	}
	// What is copied up, and what is given away, is stored with the IDs of the VM.
	require.NoError(t, os.Chown(filepath.Join(target, "etc/name"), firstUser+1, firstGroup+2))
	for _, root := range []string{target, l.upper()} {
		require.Equal(t, fmt.Sprint(firstUser+1, ":", firstGroup+2), owner(filepath.Join(root, "etc/name")))
		require.Equal(t, roots, owner(filepath.Join(root, "etc")))
	}
	require.NoError(t, l.Remove())
	require.NoError(t, m.Forget(serial))
}

func TestMountAtOnce(t *testing.T) {
	m, dir := newTest(t)
	first, _ := m.mountTest(t, dir, "first")
	require.NoError(t, first.Remove())
	var wg sync.WaitGroup
	for _, id := range []string{"a", "b", "c", "d", "e", "f"} {
		wg.Go(func() {
			target := filepath.Join(dir, "c", id)
			if err := os.MkdirAll(target, 0o755); err != nil {
				t.Error(err)
				return
			}
			l, err := m.Mount(t.Context(), id, serial, target, nil)
			if err != nil {
				t.Error(err)
				return
			}
			if err := l.Remove(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func TestMountFails(t *testing.T) {
	m, dir := newTest(t)
	_, err := m.Mount(t.Context(), "a", "../x", dir, nil)
	require.True(t, errdefs.IsInvalidArgument(err))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	_, err = m.Mount(ctx, "a", "none", dir, nil)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.Empty(t, m.images)
	require.NoDirExists(t, filepath.Join(dir, "layers", "a"))
}

func TestWalk(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "a/b"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "a/b/f"), make([]byte, 100_000), 0o644))
	require.NoError(t, os.Link(filepath.Join(dir, "a/b/f"), filepath.Join(dir, "g")))
	require.NoError(t, os.Symlink("/", filepath.Join(dir, "l")))
	u, err := walk(t.Context(), dir, 1000)
	require.NoError(t, err)
	require.EqualValues(t, 4, u.Inodes) // a, b, f once, l
	require.GreaterOrEqual(t, u.Bytes, uint64(100_000))
	require.Less(t, u.Bytes, uint64(200_000))
	u, err = walk(t.Context(), dir, 2)
	require.NoError(t, err)
	require.EqualValues(t, 2, u.Inodes)
	_, err = walk(t.Context(), filepath.Join(dir, "none"), 2)
	require.Error(t, err)
}

// Project quotas need an ext4 of one's own.
func TestQuota(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	image, mnt := filepath.Join(dir, "disk"), filepath.Join(dir, "mnt")
	require.NoError(t, os.WriteFile(image, nil, 0o600))
	require.NoError(t, os.Truncate(image, 64<<20))
	require.NoError(t, os.Mkdir(mnt, 0o755))
	for _, c := range [][]string{
		{"mkfs.ext4", "-q", "-O", "quota,project", "-E", "quotatype=prjquota", image},
		{"mount", "-o", "loop,prjquota", image, mnt},
	} {
		if out, err := exec.CommandContext(t.Context(), c[0], c[1:]...).CombinedOutput(); err != nil {
			t.Skipf("needs ext4 with project quotas on a loop device: %v: %s", err, out)
		}
	}
	t.Cleanup(func() { require.NoError(t, unix.Unmount(mnt, unix.MNT_DETACH)) })
	layer := filepath.Join(mnt, "layer")
	require.NoError(t, os.Mkdir(layer, 0o755))
	require.NoError(t, setProject(layer, 7))
	require.NoError(t, os.Mkdir(filepath.Join(layer, "upper"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(layer, "upper/f"), make([]byte, 1<<20), 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(mnt, "other"), make([]byte, 1<<20), 0o644))
	unix.Sync()
	u, err := quotaUsage(mnt, 7)
	require.NoError(t, err)
	require.EqualValues(t, 3, u.Inodes)
	require.InDelta(t, 1<<20, u.Bytes, 64<<10)
	u, err = quotaUsage(mnt, 8)
	require.NoError(t, err)
	require.Zero(t, u.Bytes)
}
