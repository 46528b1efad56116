// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package volumes

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/controller/shim/ninep"
	"github.com/cloudhv/containerd-cloudhv/guest/api"
)

// mounted is a directory with a file system of its own, shared with its clones, and below
// it one more at "sub".
func mounted(t *testing.T) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root mounts")
	}
	dir := t.TempDir()
	mount(t, dir)
	require.NoError(t, unix.Mount("", dir, "", unix.MS_SHARED, ""))
	sub := filepath.Join(dir, "sub dir")
	require.NoError(t, os.Mkdir(sub, 0o755))
	mount(t, sub)
	return dir
}

func mount(t *testing.T, dir string) {
	t.Helper()
	require.NoError(t, unix.Mount("test", dir, "tmpfs", 0, "size=64k"))
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
}

func at(fd int, name string) string { return fmt.Sprintf("/proc/self/fd/%d/%s", fd, name) }

func open(t *testing.T, source string, o Options) *tree {
	t.Helper()
	tr, err := openTree(source, o)
	require.NoError(t, err)
	t.Cleanup(func() {
		_ = unix.Close(tr.fd)
		tr.close()
	})
	return tr
}

func TestTree(t *testing.T) {
	dir := mounted(t)
	link := filepath.Join(t.TempDir(), "link")
	require.NoError(t, os.Symlink(dir, link))
	for _, tc := range []struct {
		o               Options
		top, sub, later bool // can be written, and is seen
	}{
		{o: Options{}, top: true, sub: true},
		{o: Options{Recursive: true}, top: true, sub: true},
		{o: Options{Recursive: true, Readonly: true}, sub: true},
		{o: Options{Recursive: true, Readonly: true, RecursiveReadonly: true}},
		{o: Options{Recursive: true, Slave: true}, top: true, sub: true, later: true},
		{o: Options{Recursive: true, Slave: true, Readonly: true}, sub: true, later: true},
	} {
		t.Run(fmt.Sprintf("%+v", tc.o), func(t *testing.T) {
			fd := open(t, link, tc.o).fd
			for name, want := range map[string]bool{"f": tc.top, "sub dir/f": tc.sub} {
				err := os.WriteFile(at(fd, name), nil, 0o644)
				if want {
					require.NoError(t, err, name)
				} else {
					require.ErrorIs(t, err, unix.EROFS, name)
				}
			}
			_, err := os.Stat(filepath.Join(dir, "sub dir/f"))
			require.Equal(t, tc.sub && tc.o.Recursive, err == nil, "what is mounted below comes along if it was asked for")

			later := filepath.Join(dir, "later")
			require.NoError(t, os.MkdirAll(later, 0o755))
			mount(t, later)
			require.NoError(t, os.WriteFile(filepath.Join(later, "x"), nil, 0o644))
			_, err = os.Stat(at(fd, "later/x"))
			require.Equal(t, tc.later, err == nil, "what the host mounts later")
			require.NoError(t, unix.Unmount(later, 0), "the host's mounts are the host's")
			_, err = os.Stat(at(fd, "later/x"))
			require.Error(t, err)
			require.NoError(t, os.RemoveAll(filepath.Join(dir, "sub dir/f")))
			// Links lead nowhere, whoever follows them.
			require.NoError(t, os.RemoveAll(filepath.Join(dir, "l")))
			require.NoError(t, os.Symlink("/etc/passwd", filepath.Join(dir, "l")))
			_, err = os.ReadFile(at(fd, "l"))
			require.ErrorIs(t, err, unix.ELOOP)
		})
	}
}

func TestSlaveFile(t *testing.T) {
	dir := mounted(t)
	file := filepath.Join(dir, "file")
	require.NoError(t, os.WriteFile(file, []byte("x"), 0o644))
	data, err := os.ReadFile(fmt.Sprintf("/proc/self/fd/%d", open(t, file, Options{Recursive: true, Slave: true}).fd))
	require.NoError(t, err)
	require.Equal(t, "x", string(data))
	// Nothing of this process has moved.
	_, err = os.Stat(file)
	require.NoError(t, err)
}

func bind(source string, options ...string) specs.Mount {
	return specs.Mount{Type: "bind", Source: source, Destination: "/d", Options: append([]string{"rbind"}, options...)}
}

func TestSet(t *testing.T) {
	dir := mounted(t)
	s := NewSet()
	t.Cleanup(s.Close)
	proc := specs.Mount{Type: "proc", Source: "proc", Destination: "/proc"}
	a := []specs.Mount{proc, bind(dir, "rprivate", "rw"), bind(dir, "ro"), bind(dir, "rro", "noexec"), bind(dir, "rprivate", "rw"), bind(dir, "rslave", "ro")}
	require.NoError(t, s.Add("a", a))
	require.True(t, errdefs.IsAlreadyExists(s.Add("a", a)))
	require.True(t, s.Has("a"))
	require.Equal(t, proc, a[0])
	guest := func(n int, options ...string) specs.Mount {
		return specs.Mount{Type: "bind", Source: fmt.Sprint(api.VolumeRoot, "/", n), Destination: "/d", Options: append([]string{"rbind", "rprivate"}, options...)}
	}
	// Below the second one lies what can be written, so the guest's mount is no obstacle.
	require.Equal(t, []specs.Mount{guest(1, "rw"), guest(2, "rw"), guest(3, "ro", "noexec"), guest(1, "rw"), guest(4, "rw")}, a[1:])
	b := []specs.Mount{bind(dir, "rprivate", "rw"), bind(filepath.Join(dir, "sub dir"), "ro")}
	require.NoError(t, s.Add("b", b))
	require.Equal(t, []specs.Mount{guest(1, "rw"), guest(5, "ro")}, b)
	require.NoError(t, s.Add("none", []specs.Mount{proc}))
	require.False(t, s.Has("none"))

	require.Len(t, s.volumes, 5)
	s.Remove("a")
	s.Remove("a")
	require.Len(t, s.volumes, 2, "what another container uses stays")
	s.Remove("b")
	require.Empty(t, s.volumes)
	require.NoError(t, unix.Unmount(filepath.Join(dir, "sub dir"), 0))
	require.NoError(t, unix.Unmount(dir, 0))
}

// TestRefused checks that a refusal names every mount, and leaves nothing.
func TestRefused(t *testing.T) {
	dir := mounted(t)
	fifo := filepath.Join(dir, "fifo")
	require.NoError(t, unix.Mkfifo(fifo, 0o600))
	s := NewSet()
	err := s.Add("a", []specs.Mount{bind(dir), bind(fifo), bind(os.DevNull), bind(filepath.Join(dir, "none"))})
	for _, want := range []string{fifo, "a FIFO", os.DevNull, "a character device", "no such file"} {
		require.ErrorContains(t, err, want)
	}
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.Empty(t, s.volumes)
	require.False(t, s.Has("a"))
	require.NoError(t, s.Server.Add("1", openPath(t, dir), ninep.Maker{}), "no name is taken")
	s.Server.Close()
}

// TestHugePages checks that the host's huge pages, which 9p cannot map, are no volume.
func TestHugePages(t *testing.T) {
	dir := mounted(t)
	huge := filepath.Join(dir, "huge")
	require.NoError(t, os.Mkdir(huge, 0o700))
	if err := unix.Mount("nodev", huge, "hugetlbfs", 0, ""); err != nil {
		t.Skipf("no hugetlbfs: %v", err)
	}
	defer func() { require.NoError(t, unix.Unmount(huge, 0)) }()
	s := NewSet()
	err := s.Add("a", []specs.Mount{bind(huge)})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, "it is of huge pages (medium: HugePages)")
	s.Server.Close()
}

func openPath(t *testing.T, path string) int {
	t.Helper()
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	require.NoError(t, err)
	return fd
}
