// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// files checks what a file system does, in a directory that it may write to, and prints
// a line for each that it does wrong.
func files(args []string) (int, error) {
	if len(args) != 1 {
		return 64, errors.New("want a directory")
	}
	code := 0
	for _, c := range []struct {
		name string
		run  func(dir string) error
	}{
		{"names", checkNames}, {"links", checkLinks}, {"rename", checkRename}, {"unlinked", checkUnlinked},
		{"append", checkAppend}, {"sparse", checkSparse}, {"attributes", checkAttributes}, {"setgid", checkSetgid}, {"errors", checkErrors},
		{"mmap", checkMmap}, {"locks", checkLocks}, {"special", checkSpecial}, {"xattrs", checkXattrs}, {"many", checkMany},
		{"exec", checkExec}, {"statfs", checkStatfs},
	} {
		dir := filepath.Join(args[0], c.name)
		began := time.Now()
		err := os.Mkdir(dir, 0o755)
		if err == nil {
			err = c.run(dir)
		}
		if err == nil {
			err = os.RemoveAll(dir)
		}
		if err != nil {
			code = 1
			fmt.Printf("%s: %v\n", c.name, err)
		}
		fmt.Fprintf(os.Stderr, "%s: %s\n", c.name, time.Since(began).Round(time.Millisecond))
	}
	fmt.Println("checked")
	return code, nil
}

func put(path, data string) error { return os.WriteFile(path, []byte(data), 0o644) }

func has(path, want string) error {
	got, err := os.ReadFile(path)
	if err == nil && string(got) != want {
		err = fmt.Errorf("%s has %.40q: want %.40q", path, got, want)
	}
	return err
}

func fails(want syscall.Errno, what string, err error) error {
	if errors.Is(err, want) {
		return nil
	}
	if err == nil {
		return fmt.Errorf("%s succeeds: want %w", what, want)
	}
	return fmt.Errorf("%s: %w: want %w", what, err, want)
}

func checkNames(dir string) error {
	// Every byte that a name may have, some to a name.
	var want []string
	for b := 0; b < 256; b += 32 {
		name := []byte("x")
		for i := range 32 {
			if c := byte(b + i); c != 0 && c != '/' {
				name = append(name, c)
			}
		}
		want = append(want, string(name))
	}
	want = append(want, strings.Repeat("n", 255), "...", " ")
	slices.Sort(want)
	for _, n := range want {
		if err := put(filepath.Join(dir, n), n); err != nil {
			return err
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		return fmt.Errorf("%d names: want %d", len(got), len(want))
	}
	for _, n := range want {
		if err := has(filepath.Join(dir, n), n); err != nil {
			return err
		}
	}
	return nil
}

func checkLinks(dir string) error {
	a, b, s := dir+"/a", dir+"/b", dir+"/s"
	var st syscall.Stat_t
	if err := errors.Join(put(a, "linked"), os.Link(a, b), os.Symlink("b", s), has(s, "linked"), put(b, "other"), has(a, "other"), syscall.Stat(a, &st)); err != nil {
		return err
	}
	if st.Nlink != 2 {
		return fmt.Errorf("%d links: want 2", st.Nlink)
	}
	to, err := os.Readlink(s)
	if err != nil || to != "b" {
		return fmt.Errorf("link to %q: %w", to, err)
	}
	return errors.Join(os.Remove(a), has(b, "other"), os.Symlink("s1", dir+"/s1"), fails(unix.ELOOP, "loop", put(dir+"/s1", "")))
}

func checkRename(dir string) error {
	err := errors.Join(os.MkdirAll(dir+"/d/e", 0o755), put(dir+"/a", "a"), put(dir+"/b", "b"), os.Rename(dir+"/a", dir+"/d/a"), has(dir+"/d/a", "a"),
		os.Rename(dir+"/d/a", dir+"/b"), has(dir+"/b", "a"), os.Mkdir(dir+"/f", 0o755), unix.Rename(dir+"/d/e", dir+"/f"))
	if err != nil {
		return err
	}
	// An open file keeps being the one, wherever its directory goes.
	f, err := os.OpenFile(dir+"/d/open", os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := os.Rename(dir+"/d", dir+"/moved"); err != nil {
		return err
	}
	if _, err := f.WriteString("still"); err != nil {
		return err
	}
	return errors.Join(has(dir+"/moved/open", "still"), fails(unix.ENOTEMPTY, "rename onto a full directory", unix.Rename(dir+"/f", dir+"/moved")))
}

func checkUnlinked(dir string) error {
	f, err := os.OpenFile(dir+"/a", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := os.Remove(dir + "/a"); err != nil {
		return err
	}
	if _, err := f.WriteString("0123456789"); err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(5), f.Chmod(0o400), f.Sync()); err != nil {
		return err
	}
	buf := make([]byte, 10)
	n, err := f.ReadAt(buf, 0)
	if !errors.Is(err, io.EOF) || string(buf[:n]) != "01234" {
		return fmt.Errorf("read %q: %w", buf[:n], err)
	}
	return fails(unix.ENOENT, "look", func() error { _, err := os.Stat(dir + "/a"); return err }())
}

func checkAppend(dir string) error {
	a, err := os.OpenFile(dir+"/log", os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer a.Close()
	b, err := os.OpenFile(dir+"/log", os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	defer b.Close()
	var want strings.Builder
	for i := range 100 {
		line := fmt.Sprintln(i)
		want.WriteString(line)
		if _, err := []*os.File{a, b}[i%2].WriteString(line); err != nil {
			return err
		}
	}
	return has(dir+"/log", want.String())
}

func checkSparse(dir string) error {
	const size = 2<<30 + 5
	f, err := os.OpenFile(dir+"/big", os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("end"), size-3); err != nil {
		return err
	}
	var st syscall.Stat_t
	if err := syscall.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	if st.Size != size || st.Blocks > 1000 {
		return fmt.Errorf("size %d in %d blocks: want %d in a few", st.Size, st.Blocks, int64(size))
	}
	buf := make([]byte, 1<<20)
	n, err := f.ReadAt(buf, size-int64(len(buf)))
	if err != nil || n != len(buf) || !bytes.Equal(buf[n-3:], []byte("end")) || bytes.Count(buf, []byte{0}) != n-3 {
		return fmt.Errorf("the end reads as %d bytes with %q: %w", n, buf[n-3:], err)
	}
	return errors.Join(f.Truncate(10), has(dir+"/big", strings.Repeat("\x00", 10)))
}

func checkAttributes(dir string) error {
	a := dir + "/a"
	at, mt := time.Unix(1_000_000_000, 0), time.Unix(5, 0)
	if err := errors.Join(put(a, "x"), os.Chown(a, 1234, 5678), os.Chmod(a, 0o640|os.ModeSetuid), os.Chtimes(a, at, mt)); err != nil {
		return err
	}
	var st syscall.Stat_t
	if err := syscall.Stat(a, &st); err != nil {
		return err
	}
	got := fmt.Sprintf("%o %d:%d %d.%d %d.%d", st.Mode, st.Uid, st.Gid, st.Atim.Sec, st.Atim.Nsec, st.Mtim.Sec, st.Mtim.Nsec)
	if want := "104640 1234:5678 1000000000.0 5.0"; got != want {
		return fmt.Errorf("%s: want %s", got, want)
	}
	return errors.Join(os.Symlink("a", dir+"/l"), os.Lchown(dir+"/l", 7, 8), os.Truncate(a, 100))
}

// checkSetgid is what fsGroup builds on: the group of a directory is that of what is made
// in it, by whomever.
func checkSetgid(dir string) error {
	d := dir + "/d"
	if err := errors.Join(os.Mkdir(d, 0o755), os.Chown(d, 0, 2000), os.Chmod(d, 0o2775|os.ModeSetgid)); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self, "mkfiles", d)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1000, Gid: 1000, Groups: []uint32{2000}}}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	for name, want := range map[string]string{"f": "100644 1000:2000", "sub": "42755 1000:2000", "sub/g": "100644 1000:2000"} {
		var st syscall.Stat_t
		if err := syscall.Stat(d+"/"+name, &st); err != nil {
			return err
		}
		if got := fmt.Sprintf("%o %d:%d", st.Mode, st.Uid, st.Gid); got != want {
			return fmt.Errorf("%s is %s: want %s", name, got, want)
		}
	}
	return nil
}

// mkfiles makes files, and fails where it may not.
func mkfiles(args []string) (int, error) {
	if len(args) != 1 {
		return 64, errors.New("want a directory")
	}
	d := args[0]
	return 0, errors.Join(put(d+"/f", "f"), put(d+"/f", "again"), os.Mkdir(d+"/sub", 0o755), put(d+"/sub/g", "g"),
		fails(unix.EACCES, "another's directory", put(filepath.Dir(d)+"/x", "x")), fails(unix.EPERM, "another's owner", os.Chown(d, 1000, 1000)))
}

func checkErrors(dir string) error {
	exclusive := func() error {
		_, err := os.OpenFile(dir+"/a", os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
		return err
	}
	_, isDir := os.OpenFile(dir, os.O_WRONLY, 0)
	return errors.Join(
		put(dir+"/a", ""),
		os.MkdirAll(dir+"/d/e", 0o755),
		fails(unix.ENOENT, "missing", has(dir+"/none", "")),
		fails(unix.ENOENT, "missing directory", put(dir+"/none/a", "")),
		fails(unix.ENOTDIR, "below a file", put(dir+"/a/b", "")),
		fails(unix.EISDIR, "a directory", isDir),
		fails(unix.EEXIST, "exclusive", exclusive()),
		fails(unix.EEXIST, "mkdir", os.Mkdir(dir+"/a", 0o755)),
		fails(unix.ENOTEMPTY, "rmdir", unix.Rmdir(dir+"/d")),
		fails(unix.EISDIR, "unlink", unix.Unlink(dir+"/d")),
		fails(unix.ENAMETOOLONG, "long name", put(dir+"/"+strings.Repeat("n", 256), "")),
		fails(unix.EINVAL, "into itself", os.Rename(dir+"/d", dir+"/d/e/f")),
		fails(unix.EINVAL, "readlink", func() error { _, err := os.Readlink(dir + "/a"); return err }()),
	)
}

func checkMmap(dir string) error {
	f, err := os.OpenFile(dir+"/a", os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	const size = 3 * 4096
	if _, err := f.Write(bytes.Repeat([]byte("abcd"), size/4)); err != nil {
		return err
	}
	private, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	if err != nil {
		return fmt.Errorf("private: %w", err)
	}
	defer unix.Munmap(private)
	private[0] = 'X'
	shared, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("shared: %w", err)
	}
	if string(shared[:8]) != "abcdabcd" {
		return fmt.Errorf("shared reads %q", shared[:8])
	}
	copy(shared[4096:], "mapped")
	if err := unix.Msync(shared, unix.MS_SYNC); err != nil {
		return fmt.Errorf("msync: %w", err)
	}
	buf := make([]byte, 6)
	if _, err := f.ReadAt(buf, 4096); err != nil || string(buf) != "mapped" {
		return fmt.Errorf("after msync %q: %w", buf, err)
	}
	// What is written is what is mapped, and the other way round.
	if _, err := f.WriteAt([]byte("written"), 8192); err != nil {
		return err
	}
	if string(shared[8192:8199]) != "written" {
		return fmt.Errorf("mapped after a write: %q", shared[8192:8199])
	}
	shared[1] = 'Y'
	if err := unix.Munmap(shared); err != nil {
		return err
	}
	if _, err := f.ReadAt(buf, 0); err != nil || string(buf) != "aYcdab" {
		return fmt.Errorf("after munmap %q: %w", buf, err)
	}
	return nil
}

func checkLocks(dir string) error {
	open := func() (*os.File, error) { return os.OpenFile(dir+"/lock", os.O_RDWR|os.O_CREATE, 0o644) }
	a, err := open()
	if err != nil {
		return err
	}
	defer a.Close()
	b, err := open()
	if err != nil {
		return err
	}
	defer b.Close()
	whole := unix.Flock_t{Type: unix.F_WRLCK}
	free := unix.Flock_t{Type: unix.F_UNLCK}
	return errors.Join(
		unix.Flock(int(a.Fd()), unix.LOCK_EX),
		fails(unix.EWOULDBLOCK, "flock", unix.Flock(int(b.Fd()), unix.LOCK_SH|unix.LOCK_NB)),
		unix.Flock(int(a.Fd()), unix.LOCK_UN),
		unix.Flock(int(b.Fd()), unix.LOCK_EX|unix.LOCK_NB),
		unix.Flock(int(b.Fd()), unix.LOCK_UN),
		unix.FcntlFlock(a.Fd(), unix.F_OFD_SETLK, &whole),
		fails(unix.EAGAIN, "fcntl", unix.FcntlFlock(b.Fd(), unix.F_OFD_SETLK, &whole)),
		unix.FcntlFlock(a.Fd(), unix.F_OFD_SETLK, &free),
		unix.FcntlFlock(b.Fd(), unix.F_OFD_SETLK, &whole),
	)
}

func checkSpecial(dir string) error {
	if err := unix.Mkfifo(dir+"/fifo", 0o600); err != nil {
		return err
	}
	f, err := os.OpenFile(dir+"/fifo", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	w, err := os.OpenFile(dir+"/fifo", os.O_WRONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer w.Close()
	buf := make([]byte, 3)
	if _, err := w.WriteString("abc"); err != nil {
		return err
	}
	if _, err := io.ReadFull(f, buf); err != nil || string(buf) != "abc" {
		return fmt.Errorf("FIFO: %q: %w", buf, err)
	}
	l, err := net.Listen("unix", dir+"/socket")
	if err != nil {
		return err
	}
	defer l.Close()
	c, err := net.Dial("unix", dir+"/socket")
	if err != nil {
		return err
	}
	return c.Close()
}

func checkXattrs(dir string) error {
	a := dir + "/a"
	if err := put(a, ""); err != nil {
		return err
	}
	err := unix.Setxattr(a, "user.x", []byte("value"), unix.XATTR_CREATE)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return nil // the host's file system has none
	}
	buf := make([]byte, 100)
	n, gerr := unix.Getxattr(a, "user.x", buf)
	m, lerr := unix.Listxattr(a, buf[50:])
	if err := errors.Join(err, gerr, lerr); err != nil {
		return err
	}
	if string(buf[:n]) != "value" || string(buf[50:50+m]) != "user.x\x00" {
		return fmt.Errorf("%q, %q", buf[:n], buf[50:50+m])
	}
	_, none := unix.Getxattr(a, "user.none", buf)
	return errors.Join(
		fails(unix.ENODATA, "none", none),
		fails(unix.EEXIST, "again", unix.Setxattr(a, "user.x", nil, unix.XATTR_CREATE)),
		unix.Removexattr(a, "user.x"),
		fails(unix.ENODATA, "removed", unix.Removexattr(a, "user.x")),
	)
}

func checkMany(dir string) error {
	const many = 60
	for i := range many {
		if err := put(fmt.Sprintf("%s/a file with a name of some length %d", dir, i), ""); err != nil {
			return err
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != many {
		return fmt.Errorf("%d entries: want %d: %w", len(entries), many, err)
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func checkExec(dir string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	data, err := os.ReadFile(self)
	if err != nil {
		return err
	}
	if err := os.WriteFile(dir+"/program", data, 0o755); err != nil {
		return err
	}
	var ee *exec.ExitError
	if err := exec.Command(dir+"/program", "exit", "3").Run(); !errors.As(err, &ee) || ee.ExitCode() != 3 {
		return fmt.Errorf("exit 3: %w", err)
	}
	return nil
}

func checkStatfs(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return err
	}
	if st.Blocks == 0 || st.Bavail == 0 || st.Bsize == 0 || st.Namelen != 255 {
		return fmt.Errorf("%+v", st)
	}
	return nil
}
