// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package rootfs

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// mountImage mounts an image as a guest would see it.
func mountImage(t *testing.T, path string) string {
	t.Helper()
	dir := t.TempDir()
	m := []mount.Mount{{Type: "erofs", Source: path, Options: []string{"ro", "loop"}}}
	if err := unix.Mount(path, dir, "erofs", unix.MS_RDONLY, ""); err != nil {
		require.NoError(t, mount.All(m, dir))
	}
	t.Cleanup(func() { require.NoError(t, mount.UnmountAll(dir, 0)) })
	return dir
}

// describe lists everything about a tree that an image must keep, by path.
// Files with several names are numbered in the order their first names are met.
func describe(t *testing.T, root string) map[string]string {
	t.Helper()
	tree := map[string]string{}
	links := map[[2]uint64]int{}
	require.NoError(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		line := fmt.Sprintf("mode=%o uid=%d gid=%d mtime=%d", st.Mode, st.Uid, st.Gid, info.ModTime().UnixNano())
		if !d.IsDir() {
			line += fmt.Sprintf(" size=%d nlink=%d", st.Size, st.Nlink)
			if st.Nlink > 1 {
				id := [2]uint64{st.Dev, st.Ino}
				if _, ok := links[id]; !ok {
					links[id] = len(links)
				}
				line += fmt.Sprintf(" inode=%d", links[id])
			}
		}
		switch st.Mode & syscall.S_IFMT {
		case syscall.S_IFCHR, syscall.S_IFBLK:
			line += fmt.Sprintf(" rdev=%d", st.Rdev)
		case syscall.S_IFLNK:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " to=" + to
		case syscall.S_IFREG:
			line += " sha256=" + hashFile(t, path)
		}
		rel, _ := filepath.Rel(root, path)
		tree[rel] = line + xattrs(t, path)
		return nil
	}))
	return tree
}

func hashFile(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	require.NoError(t, err)
	return hex.EncodeToString(h.Sum(nil))
}

func xattrs(t *testing.T, path string) string {
	t.Helper()
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if err == unix.ENOTSUP {
		return ""
	}
	require.NoError(t, err)
	names := strings.FieldsFunc(string(buf[:n]), func(r rune) bool { return r == 0 })
	slices.Sort(names)
	var out string
	for _, name := range names {
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, name, value)
		require.NoError(t, err)
		out += fmt.Sprintf(" %s=%x", name, value[:n])
	}
	return out
}

// populate makes a tree with everything that images are known to hold.
func populate(t *testing.T, lower, upper string) {
	t.Helper()
	write := func(path, content string, mode os.FileMode) {
		t.Helper()
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, []byte(content), mode))
		require.NoError(t, os.Chmod(path, mode))
	}
	at := func(parts ...string) string { return filepath.Join(append([]string{lower}, parts...)...) }
	write(at("bin/tool"), strings.Repeat("tool", 5000), 0o755)
	write(at("bin/su"), "su", 0o4755)
	write(at("bin/wall"), "wall", 0o2755)
	require.NoError(t, os.MkdirAll(at("tmp"), 0o755))
	require.NoError(t, os.Chmod(at("tmp"), 0o1777|os.ModeSticky))
	for _, name := range []string{"bin/sh", "bin/ls", "usr/bin/again"} {
		require.NoError(t, os.MkdirAll(filepath.Dir(at(name)), 0o755))
		require.NoError(t, os.Link(at("bin/tool"), at(name)))
	}
	require.NoError(t, os.Symlink("../bin/tool", at("usr/bin/tool")))
	require.NoError(t, os.Symlink(strings.Repeat("x/", 1500)+"end", at("long-link")))
	require.NoError(t, unix.Mknod(at("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	require.NoError(t, unix.Mknod(at("disk"), unix.S_IFBLK|0o660, int(unix.Mkdev(259, 70000))))
	require.NoError(t, unix.Mkfifo(at("fifo"), 0o640))
	require.NoError(t, unix.Mknod(at("sock"), unix.S_IFSOCK|0o755, 0))
	for i, name := range []string{"odd\nname", "\xff\xfe", " ", "-rf", "a\\b", strings.Repeat("n", maxName), "ünï", "..."} {
		write(at("odd", name), fmt.Sprint(i), 0o600)
	}
	write(at("owned"), "x", 0o640)
	require.NoError(t, os.Chown(at("owned"), 4000000000, 100001))
	write(at("empty"), "", 0o000)
	write(at("attrs"), "x", 0o644)
	for name, value := range map[string]string{
		"user.short": "v", "user.long": strings.Repeat("v", 2500), "user.empty": "", "trusted.t": "t",
		"security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
	} {
		require.NoError(t, unix.Setxattr(at("attrs"), name, []byte(value), 0))
	}
	require.NoError(t, unix.Setxattr(at("odd"), "user.dir", []byte("d"), 0))
	big, err := os.OpenFile(at("big"), os.O_CREATE|os.O_WRONLY, 0o644)
	require.NoError(t, err)
	_, err = big.WriteAt([]byte("end"), 40<<20)
	require.NoError(t, err)
	require.NoError(t, big.Close())
	for i := range 2000 {
		write(at("many", fmt.Sprintf("f%05d", i)), fmt.Sprint(i), 0o644)
	}
	for name, when := range map[string]time.Time{
		"empty": time.Unix(0, 0), "owned": time.Unix(1e9, 123456789), "odd": time.Unix(-86400, 0), "attrs": time.Unix(5e9, 1),
	} {
		require.NoError(t, os.Chtimes(at(name), when, when))
	}
	populateUpper(t, at, upper, write)
}

// populateUpper makes a second layer that hides and replaces parts of the first.
func populateUpper(t *testing.T, at func(...string) string, upper string, write func(string, string, os.FileMode)) {
	t.Helper()
	write(at("gone"), "x", 0o644)
	write(at("gone-dir/deep/file"), "x", 0o644)
	write(at("opaque/hidden"), "x", 0o644)
	write(at("merged/lower"), "l", 0o644)
	require.NoError(t, unix.Mknod(filepath.Join(upper, "gone"), unix.S_IFCHR, 0))
	require.NoError(t, unix.Mknod(filepath.Join(upper, "gone-dir"), unix.S_IFCHR, 0))
	write(filepath.Join(upper, "opaque/seen"), "x", 0o644)
	require.NoError(t, unix.Setxattr(filepath.Join(upper, "opaque"), "trusted.overlay.opaque", []byte("y"), 0))
	write(filepath.Join(upper, "merged/upper"), "u", 0o644)
	write(filepath.Join(upper, "replaced"), "new", 0o600)
	write(at("replaced"), "old", 0o644)
}

func TestTheImageIsTheTree(t *testing.T) {
	needRoot(t)
	lower, upper := t.TempDir(), t.TempDir()
	populate(t, lower, upper)
	f := newFixture(t)
	f.sn.add("c1", upper, lower)

	want := t.TempDir()
	require.NoError(t, mount.All([]mount.Mount{{
		Type: "overlay", Source: "overlay", Options: []string{"lowerdir=" + upper + ":" + lower},
	}}, want))
	t.Cleanup(func() { require.NoError(t, mount.UnmountAll(want, 0)) })
	expected := describe(t, want)
	require.NotContains(t, expected, "gone")
	require.NotContains(t, expected, "opaque/hidden")
	require.Contains(t, expected["bin/ls"], "nlink=4")

	img, err := f.get(t.Context(), "c1")
	require.NoError(t, err)
	got := describe(t, mountImage(t, img.Path))
	for path, line := range expected {
		require.Equal(t, line, got[path], "%q", path)
	}
	require.Len(t, got, len(expected))
	f.requireClean(t, 1)
}

func TestHardLinksTakeNoSpace(t *testing.T) {
	needRoot(t)
	f := newFixture(t)
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "a"), make([]byte, 8<<20), 0o644))
	for i := range 20 {
		require.NoError(t, os.Link(filepath.Join(dir, "a"), filepath.Join(dir, fmt.Sprint("link", i))))
	}
	f.sn.add("c1", dir)
	img, err := f.get(t.Context(), "c1")
	require.NoError(t, err)
	st, err := os.Stat(img.Path)
	require.NoError(t, err)
	require.Less(t, st.Size(), int64(9<<20))
}

// mkfs.erofs leaves out what is called lost+found; that must not go unnoticed.
func TestNamesThatTheBuilderLeavesOut(t *testing.T) {
	needRoot(t)
	for name, tc := range map[string]struct {
		path    string
		refused bool
	}{
		"file":                  {"usr/lost+found", true},
		"file that begins so":   {"lost+found-list", true},
		"directory with a file": {"lost+found/x", true},
		"empty directory":       {"lost+found/", false},
		"other":                 {"my-lost+found", false},
		"name too long":         {strings.Repeat("n", maxName+1), true},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			dir := layer(t, map[string]string{"a": "1"})
			path := filepath.Join(dir, tc.path)
			if strings.HasSuffix(tc.path, "/") {
				require.NoError(t, os.Mkdir(path, 0o700))
			} else {
				require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
				require.NoError(t, os.WriteFile(path, nil, 0o644))
			}
			f.sn.add("c1", dir)
			_, err := f.get(t.Context(), "c1")
			if tc.refused {
				require.ErrorIs(t, err, errdefs.ErrNotImplemented)
				require.ErrorContains(t, err, "/"+strings.Split(tc.path, "/x")[0])
				f.requireClean(t, 0)
				return
			}
			require.NoError(t, err)
		})
	}
}

func TestTheBuilderDiesWithItsContext(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	pidFile := filepath.Join(t.TempDir(), "pid")
	b := Builder{Binary: script(t, "sleep 1000 & echo $! > "+pidFile+".new; mv "+pidFile+".new "+pidFile+"; wait")}
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx, t.TempDir(), filepath.Join(t.TempDir(), "out"), emptyKey) }()
	var pid int
	require.Eventually(t, func() bool {
		data, err := os.ReadFile(pidFile)
		if err != nil {
			return false
		}
		_, err = fmt.Sscan(string(data), &pid)
		return err == nil
	}, 20*time.Second, 10*time.Millisecond, "the child has no child")
	cancel()
	require.ErrorIs(t, <-done, context.Canceled)
	require.Eventually(t, func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || strings.Contains(string(stat), ") Z ")
	}, 5*time.Second, 10*time.Millisecond, "the child's child lives")
}
