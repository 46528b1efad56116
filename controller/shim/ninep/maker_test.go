// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package ninep

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

const mappedUser, mappedGroup = 131072, 262144

// mappedVolume is a directory, and a descriptor of an ID-mapped mount of it in which user
// and group 0 are mappedUser and mappedGroup.
func mappedVolume(t *testing.T) (dir string, fd int) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root mounts")
	}
	dir = t.TempDir()
	require.NoError(t, unix.Mount("test", dir, "tmpfs", 0, "size=64k,mode=755"))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	sleeper := exec.CommandContext(t.Context(), "sleep", "60")
	sleeper.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{HostID: mappedUser, Size: 65536}},
		GidMappings: []syscall.SysProcIDMap{{HostID: mappedGroup, Size: 65536}},
	}
	require.NoError(t, sleeper.Start())
	defer func() {
		_ = sleeper.Process.Kill()
		_ = sleeper.Wait()
	}()
	userns, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", sleeper.Process.Pid))
	require.NoError(t, err)
	defer userns.Close()
	fd, err = unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	require.NoError(t, err)
	err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(userns.Fd())})
	if err != nil {
		_ = unix.Close(fd)
		t.Skipf("NOT TESTED: this kernel has no ID-mapped tmpfs: %v", err)
	}
	return dir, fd
}

// TestMaker makes names of every kind in an ID-mapped volume, for a user of its, in a
// directory that is not his. They belong to him, on the host to whom he is there.
func TestMaker(t *testing.T) {
	dir, fd := mappedVolume(t)
	s := NewServer(Limits{})
	t.Cleanup(s.Close)
	require.NoError(t, s.Add("v", fd, Maker{UID: mappedUser, GID: mappedGroup}))
	c := dial(t, s)
	const user, group = 1000, 2000
	c.attach(10, mappedUser+user)
	require.NoError(t, c.walk(10, 1, "v"))
	require.NoError(t, c.walk(1, 2))
	require.NoError(t, c.create(2, "file", unix.O_RDWR, 0o604, mappedGroup+group))
	require.NoError(t, c.write(2, 0, "content"))
	c.must(tMkdir, func(e *encoder) { e.u32(1); e.string("dir"); e.u32(0o705); e.u32(mappedGroup + group) })
	c.must(tSymlink, func(e *encoder) { e.u32(1); e.string("link"); e.string("file"); e.u32(mappedGroup + group) })
	c.must(tMknod, func(e *encoder) {
		e.u32(1)
		e.string("fifo")
		e.u32(unix.S_IFIFO | 0o606)
		e.u32(0)
		e.u32(0)
		e.u32(mappedGroup + group)
	})
	c.must(tLink, func(e *encoder) { e.u32(1); e.u32(2); e.string("hard") })
	c.must(tRenameat, func(e *encoder) { e.u32(1); e.string("fifo"); e.u32(1); e.string("moved") })
	for _, name := range []string{"file", "dir", "link", "hard", "moved"} {
		var st unix.Stat_t
		require.NoError(t, unix.Lstat(filepath.Join(dir, name), &st), name)
		require.Equal(t, fmt.Sprint(user, group), fmt.Sprint(st.Uid, st.Gid), name)
	}
	require.NoError(t, c.setattr(2, setUID|setGID, 0, mappedUser, mappedGroup, 0))
	var st unix.Stat_t
	require.NoError(t, unix.Stat(filepath.Join(dir, "file"), &st))
	require.Equal(t, "0 0", fmt.Sprint(st.Uid, st.Gid))

	// Who is not in the mapping cannot own anything, nor is what was made left.
	requireErrno(t, unix.EOVERFLOW, c.setattr(2, setUID, 0, 0, 0, 0), "to nobody")
	c.attach(11, 0)
	require.NoError(t, c.walk(11, 3, "v"))
	requireErrno(t, unix.EOVERFLOW, c.create(3, "nobodys", unix.O_RDWR, 0o644, mappedGroup), "by nobody")
	require.NoFileExists(t, filepath.Join(dir, "nobodys"))

	// What a stranger has is out of reach.
	stranger := filepath.Join(dir, "stranger")
	require.NoError(t, os.WriteFile(stranger, []byte("x"), 0o600))
	require.NoError(t, os.Chown(stranger, 100_000, 100_000))
	require.NoError(t, c.walk(1, 4, "stranger"))
	requireErrno(t, unix.EACCES, c.open(4, unix.O_RDONLY), "read")
	require.Error(t, c.setattr(4, setUID, 0, mappedUser, 0, 0))

	// Nobody has stayed somebody else: what is made elsewhere is root's.
	plain, _ := volume(t)
	require.NoError(t, s.Add("plain", openPath(t, plain), Maker{}))
	for i := range uint32(20) {
		require.NoError(t, c.walk(0, 20+i, "plain"))
		require.NoError(t, c.create(20+i, fmt.Sprint("f", i), unix.O_RDWR, 0o644, 0))
		require.NoError(t, unix.Stat(filepath.Join(plain, fmt.Sprint("f", i)), &st))
		require.Equal(t, "0 0", fmt.Sprint(st.Uid, st.Gid))
	}
}
