// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package ninep

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// volume is a directory in another one, so that there is something to escape to.
func volume(t testing.TB) (dir, outside string) {
	t.Helper()
	top := t.TempDir()
	dir, outside = filepath.Join(top, "volume"), filepath.Join(top, "outside")
	require.NoError(t, os.Mkdir(dir, 0o755))
	require.NoError(t, os.Mkdir(outside, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(outside, "secret"), []byte("secret"), 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "a"), []byte("content"), 0o644))
	require.NoError(t, os.Mkdir(filepath.Join(dir, "d"), 0o755))
	require.NoError(t, os.Symlink("../outside", filepath.Join(dir, "link")))
	return dir, outside
}

func TestReadWrite(t *testing.T) {
	t.Parallel()
	dir, _ := volume(t)
	c, _ := connect(t, Limits{}, dir)
	require.NoError(t, c.walk(0, 1, "v", "a"))
	require.NoError(t, c.open(1, unix.O_RDWR))
	got, err := c.read(1, 3, 100)
	require.NoError(t, err)
	require.Equal(t, "tent", got)
	require.NoError(t, c.write(1, 7, strings.Repeat("x", 70000)))
	got, err = c.read(1, 7, 100000)
	require.NoError(t, err)
	require.Len(t, got, 70000)
	got, err = c.read(1, 1<<40, 10)
	require.NoError(t, err)
	require.Empty(t, got, "beyond the end")
	requireErrno(t, unix.EBADF, c.open(1, unix.O_RDONLY), "open twice")
	requireErrno(t, unix.EBADF, c.walk(0, 1, "v"), "fid in use")

	// A file that is gone is still there for who has it.
	require.NoError(t, os.Remove(filepath.Join(dir, "a")))
	require.NoError(t, c.write(1, 0, "more"))
	require.NoError(t, c.setattr(1, setSize|setMode, 0o400, 0, 0, 2))
	got, err = c.read(1, 0, 10)
	require.NoError(t, err)
	require.Equal(t, "mo", got)
	require.NoError(t, c.clunk(1))
	require.Equal(t, 1, descriptors(t, dir), "the volume itself")
}

// TestConfined tries what leads out of a volume.
func TestConfined(t *testing.T) {
	t.Parallel()
	dir, outside := volume(t)
	c, _ := connect(t, Limits{}, dir)
	require.NoError(t, c.walk(0, 1, "v"))
	for _, names := range [][]string{
		{".."}, {"."}, {""}, {"d", "..", ".."}, {"../outside"}, {"d/../.."}, {"/"}, {"a\x00b"}, {"link", "secret"}, {"link", ".."}, {"a", "b"},
		{strings.Repeat("x", 256)},
	} {
		require.Error(t, c.walk(1, 2, names...), "%q", names)
		requireErrno(t, unix.EBADF, c.clunk(2), "no fid may be left")
	}
	require.Error(t, c.walk(0, 2, ".."))
	require.Error(t, c.walk(0, 2, "v", ".."))
	require.NoError(t, c.walk(1, 2, "link"))
	require.Error(t, c.open(2, unix.O_RDONLY), "a link is not followed")
	require.Error(t, c.walk(2, 3, "secret"))
	d := c.must(tReadlink, func(e *encoder) { e.u32(2) })
	require.Equal(t, "../outside", d.string())
	require.NoError(t, c.setattr(2, setUID, 0, 0, 0, 0))
	requireErrno(t, unix.EOPNOTSUPP, c.setattr(2, setMode, 0o777, 0, 0, 0), "mode of a link")

	for _, name := range []string{"..", "x/y", "", "../outside/x", "link/x"} {
		require.NoError(t, c.walk(1, 3))
		require.Error(t, c.create(3, name, unix.O_RDWR, 0o644, 0), name)
		_, err := c.call(tMkdir, func(e *encoder) { e.u32(1); e.string(name); e.u32(0o755); e.u32(0) })
		require.Error(t, err, name)
		_, err = c.call(tUnlinkat, func(e *encoder) { e.u32(1); e.string(name); e.u32(unix.AT_REMOVEDIR) })
		require.Error(t, err, name)
		_, err = c.call(tRenameat, func(e *encoder) { e.u32(1); e.string("a"); e.u32(1); e.string(name) })
		require.Error(t, err, name)
		require.NoError(t, c.clunk(3))
	}
	// A name that is a link is not made through it, nor opened.
	require.NoError(t, c.walk(1, 3))
	require.Error(t, c.create(3, "link", unix.O_RDWR, 0o644, 0))
	require.NoError(t, os.Symlink("../outside/new", filepath.Join(dir, "dangling")))
	require.Error(t, c.create(3, "dangling", unix.O_RDWR, 0o644, 0))
	entries, err := os.ReadDir(outside)
	require.NoError(t, err)
	require.Len(t, entries, 1)
}

// TestRenameRace exchanges a directory with a link out of the volume while it is walked.
func TestRenameRace(t *testing.T) {
	t.Parallel()
	dir, outside := volume(t)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "d", "secret"), []byte("ours"), 0o644))
	c, _ := connect(t, Limits{}, dir)
	require.NoError(t, c.walk(0, 1, "v"))
	stop := make(chan struct{})
	var racer sync.WaitGroup
	racer.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				_ = unix.Renameat2(unix.AT_FDCWD, filepath.Join(dir, "d"), unix.AT_FDCWD, filepath.Join(dir, "link"), unix.RENAME_EXCHANGE)
			}
		}
	})
	defer func() { close(stop); racer.Wait() }()
	read := 0
	for until := time.Now().Add(time.Second); time.Now().Before(until); {
		if c.walk(1, 2, "d", "secret") != nil {
			continue
		}
		if c.open(2, unix.O_RDONLY) == nil {
			got, err := c.read(2, 0, 100)
			require.NoError(t, err)
			require.Equal(t, "ours", got)
			read++
		}
		require.NoError(t, c.clunk(2))
	}
	require.NotZero(t, read)
	_ = outside
}

func TestOwnership(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("only root gives files away")
	}
	dir, _ := volume(t)
	c, _ := connect(t, Limits{}, dir)
	c.attach(10, 1234)
	require.NoError(t, c.walk(10, 11, "v"))
	require.NoError(t, c.walk(11, 12))
	require.NoError(t, c.create(12, "new", unix.O_WRONLY, 0o6771, 77))
	_, err := c.call(tMkdir, func(e *encoder) { e.u32(11); e.string("newdir"); e.u32(0o2777); e.u32(78) })
	require.NoError(t, err)
	_, err = c.call(tSymlink, func(e *encoder) { e.u32(11); e.string("newlink"); e.string("/etc/passwd"); e.u32(79) })
	require.NoError(t, err)
	_, err = c.call(tMknod, func(e *encoder) {
		e.u32(11)
		e.string("fifo")
		for _, v := range []uint32{unix.S_IFIFO | 0o622, 0, 0, 80} {
			e.u32(v)
		}
	})
	require.NoError(t, err)
	for name, want := range map[string]string{
		"new": "106771 1234:77", "newdir": "42777 1234:78", "newlink": "120777 1234:79", "fifo": "10622 1234:80",
	} {
		var st unix.Stat_t
		require.NoError(t, unix.Lstat(filepath.Join(dir, name), &st))
		require.Equal(t, want, fmt.Sprintf("%o %d:%d", st.Mode, st.Uid, st.Gid), name)
	}
	// What is there already stays whose it is, and is no error without O_EXCL.
	require.NoError(t, c.walk(11, 13))
	requireErrno(t, unix.EEXIST, c.create(13, "a", unix.O_RDWR|openExcl, 0o777, 77), "exclusive")
	require.NoError(t, c.create(13, "a", unix.O_RDWR, 0o777, 77))
	var st unix.Stat_t
	require.NoError(t, unix.Stat(filepath.Join(dir, "a"), &st))
	require.Equal(t, "100644 0:0", fmt.Sprintf("%o %d:%d", st.Mode, st.Uid, st.Gid))
	// Devices would be the host's, and FIFOs are the guest's to open.
	_, err = c.call(tMknod, func(e *encoder) {
		e.u32(11)
		e.string("dev")
		for _, v := range []uint32{unix.S_IFCHR | 0o666, 1, 3, 0} {
			e.u32(v)
		}
	})
	requireErrno(t, unix.EPERM, err, "device node")
	require.NoError(t, c.walk(11, 14, "fifo"))
	requireErrno(t, unix.ENXIO, c.open(14, unix.O_RDONLY), "FIFO")
}

func TestReaddir(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	want := []string{".", ".."}
	for i := range 3000 {
		name := fmt.Sprintf("%d-%s\xff\n", i, strings.Repeat("n", i%200))
		want = append(want, name)
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), nil, 0o600))
	}
	slices.Sort(want)
	c, _ := connect(t, Limits{}, dir)
	require.NoError(t, c.walk(0, 1, "v"))
	require.NoError(t, c.open(1, unix.O_RDONLY))
	for _, count := range []uint32{600, 4096, 100000} {
		got := c.list(1, count)
		slices.Sort(got)
		require.Equal(t, want, got, "%d bytes at a time", count)
	}
	require.NoError(t, c.walk(0, 2))
	require.NoError(t, c.open(2, unix.O_RDONLY))
	require.Empty(t, c.list(2, 4096), "volumes are known by name only")
}

func TestXattrs(t *testing.T) {
	t.Parallel()
	dir, _ := volume(t)
	if err := unix.Setxattr(filepath.Join(dir, "a"), "user.host", []byte("h"), 0); err != nil {
		t.Skipf("no extended attributes here: %v", err)
	}
	c, _ := connect(t, Limits{}, dir)
	next := uint32(100)
	set := func(name, value string, flags uint32) error {
		next++
		if err := c.walk(0, next, "v", "a"); err != nil {
			return err
		}
		_, err := c.call(tXattrcreate, func(e *encoder) { e.u32(next); e.string(name); e.u64(uint64(len(value))); e.u32(flags) })
		if err == nil && value != "" {
			err = c.write(next, 0, value)
		}
		if cerr := c.clunk(next); err == nil {
			err = cerr
		}
		return err
	}
	get := func(name string) (string, error) {
		next++
		require.NoError(t, c.walk(0, 1, "v", "a"))
		defer func() { require.NoError(t, c.clunk(1)) }()
		d, err := c.call(tXattrwalk, func(e *encoder) { e.u32(1); e.u32(next); e.string(name) })
		if err != nil {
			return "", err
		}
		defer func() { require.NoError(t, c.clunk(next)) }()
		return c.read(next, 0, uint32(d.u64()))
	}
	require.NoError(t, set("user.guest", "value", 0))
	requireErrno(t, unix.EEXIST, set("user.guest", "value", unix.XATTR_CREATE), "create")
	requireErrno(t, unix.EOPNOTSUPP, set("trusted.x", "value", 0), "trusted")
	for _, name := range []string{"user.guest", "user.host"} {
		got, err := get(name)
		require.NoError(t, err)
		require.Equal(t, map[string]string{"user.guest": "value", "user.host": "h"}[name], got)
	}
	got, err := get("")
	require.NoError(t, err)
	names := strings.Split(strings.TrimSuffix(got, "\x00"), "\x00")
	slices.Sort(names)
	require.Equal(t, []string{"user.guest", "user.host"}, names)
	require.NoError(t, set("user.guest", "", unix.XATTR_REPLACE))
	_, err = get("user.guest")
	requireErrno(t, unix.ENODATA, err, "removed")
	_, err = get("security.selinux")
	requireErrno(t, unix.ENODATA, err, "not carried")
}

func TestTwoVolumes(t *testing.T) {
	t.Parallel()
	dir, _ := volume(t)
	other, _ := volume(t)
	c, s := connect(t, Limits{}, dir)
	require.NoError(t, s.Add("w", openPath(t, other), Maker{}))
	require.True(t, errdefs.IsAlreadyExists(s.Add("w", openPath(t, other), Maker{})))
	require.True(t, errdefs.IsInvalidArgument(s.Add("null", openPath(t, os.DevNull), Maker{})))
	require.NoError(t, s.Add("file", openPath(t, filepath.Join(other, "a")), Maker{}))
	require.NoError(t, c.walk(0, 1, "v"))
	require.NoError(t, c.walk(0, 2, "w"))
	require.NoError(t, c.walk(1, 3, "a"))
	_, err := c.call(tLink, func(e *encoder) { e.u32(2); e.u32(3); e.string("b") })
	requireErrno(t, unix.EXDEV, err, "link")
	_, err = c.call(tRenameat, func(e *encoder) { e.u32(1); e.string("a"); e.u32(2); e.string("b") })
	requireErrno(t, unix.EXDEV, err, "rename")
	_, err = c.call(tLink, func(e *encoder) { e.u32(1); e.u32(3); e.string("b") })
	require.NoError(t, err)
	require.NoError(t, c.walk(0, 4, "file"))
	require.NoError(t, c.open(4, unix.O_RDONLY))

	// What is removed lets go of the host at once, whatever the client holds.
	require.NoError(t, c.open(3, unix.O_RDONLY))
	require.NoError(t, c.walk(1, 5, "d"))
	require.NoError(t, c.open(5, unix.O_RDONLY))
	require.Positive(t, descriptors(t, dir))
	s.Remove("v")
	require.Zero(t, descriptors(t, dir))
	_, err = c.read(3, 0, 1)
	requireErrno(t, unix.ESTALE, err, "read")
	requireErrno(t, unix.ESTALE, c.walk(1, 6, "a"), "walk")
	require.Error(t, c.walk(0, 6, "v"))
	for _, fid := range []uint32{1, 3, 5} {
		require.NoError(t, c.clunk(fid))
	}
	_, err = c.read(4, 0, 1)
	require.NoError(t, err, "others stay")
}

func TestLimits(t *testing.T) {
	t.Parallel()
	dir, _ := volume(t)
	c, s := connect(t, Limits{Fids: 10, Requests: 2}, dir)
	var err error
	n := uint32(1)
	for ; err == nil && n < 100; n++ {
		err = c.walk(0, n, "v", "a")
	}
	requireErrno(t, unix.ENFILE, err, "fids")
	require.EqualValues(t, 11, n)
	require.LessOrEqual(t, descriptors(t, dir), 10)
	require.NoError(t, c.clunk(1))
	require.NoError(t, c.walk(0, 1, "v", "a"))
	_ = c.conn.Close()
	require.Eventually(t, func() bool { return s.fids.Load() == 0 && descriptors(t, dir) == 1 }, 10*time.Second, time.Millisecond)

	for name, message := range map[string][]byte{
		"too long":     {0, 0, 0, 1, tRead, 1, 0},
		"too short":    {6, 0, 0, 0, tRead, 1, 0},
		"small msize":  {13, 0, 0, 0, tVersion, 1, 0, 1, 0, 0, 0, 0, 0},
		"reserved tag": {11, 0, 0, 0, tClunk, 0xff, 0xff, 0, 0, 0, 0},
	} {
		c := dial(t, s)
		_, err := c.conn.Write(message)
		require.NoError(t, err, name)
		_, err = c.conn.Read(make([]byte, 1))
		require.ErrorIs(t, err, io.EOF, name)
	}
}

// TestManyAtOnce has clients of the same server do much at once, for the race detector.
func TestManyAtOnce(t *testing.T) {
	t.Parallel()
	dir, _ := volume(t)
	_, s := connect(t, Limits{}, dir)
	var all sync.WaitGroup
	for i := range 8 {
		c := dial(t, s)
		all.Go(func() {
			for j := range 50 {
				name := fmt.Sprint(i, "-", j)
				if err := c.walk(0, 1, "v"); err != nil {
					t.Error(err)
				}
				if err := c.create(1, name, unix.O_RDWR, 0o644, 0); err != nil {
					t.Error(err)
				}
				if err := c.write(1, 0, name); err != nil {
					t.Error(err)
				}
				if got, err := c.read(1, 0, 100); err != nil || got != name {
					t.Error(got, err)
				}
				if err := c.clunk(1); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, entries, 8*50+3)
}

// TestAttributesAreBounded has a client begin to write attributes that it never ends, as
// many as it may have fids.
func TestAttributesAreBounded(t *testing.T) {
	dir, _ := volume(t)
	c, s := connect(t, Limits{}, dir)
	begin := func(id uint32) error {
		c.must(tWalk, func(e *encoder) { e.u32(0); e.u32(id); e.u16(2); e.string("v"); e.string("a") })
		_, err := c.call(tXattrcreate, func(e *encoder) { e.u32(id); e.string("user.big"); e.u64(maxXattr); e.u32(0) })
		return err
	}
	const most = maxXattrs / maxXattr
	for id := range uint32(most) {
		require.NoError(t, begin(id+1))
		c.must(tWrite, func(e *encoder) {
			e.u32(id + 1)
			e.u64(0)
			e.u32(maxXattr)
			e.b = append(e.b, make([]byte, maxXattr)...)
		})
	}
	require.ErrorIs(t, begin(most+1), unix.ENOMEM)
	require.EqualValues(t, maxXattrs, s.xattrs.Load())
	// The file system may refuse a value of that size; the room is given back all the same.
	_, _ = c.call(tClunk, func(e *encoder) { e.u32(1) })
	require.NoError(t, begin(most+2))
}
