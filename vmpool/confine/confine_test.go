// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package confine

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

const testUID = 1879048192 + 5151

// children are what this program does in another's place, by its first argument.
var children = map[string]func(args []string) error{
	"status": func([]string) error {
		text, err := os.ReadFile("/proc/self/status")
		fmt.Print(string(text))
		return err
	},
	"open": func(args []string) error {
		for _, path := range args {
			fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err == nil {
				_, err = unix.Pwrite(fd, []byte("x"), 0)
			}
			fmt.Println(path, err)
		}
		return nil
	},
	// names gives sockets names for as long as it can, up to a minute.
	"names": func([]string) error {
		for i := range 60_000 {
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
			if err != nil {
				return err
			}
			if err := unix.Bind(fd, &unix.SockaddrUnix{Name: fmt.Sprintf("@cloudhv-confine-%d-%d", os.Getpid(), i)}); err != nil {
				return err
			}
			fmt.Println("named")
			_ = unix.Close(fd)
			time.Sleep(time.Millisecond)
		}
		return nil
	},
	"sockets": func(args []string) error {
		for _, s := range []struct{ domain, kind int }{
			{unix.AF_UNIX, unix.SOCK_STREAM}, {unix.AF_UNIX, unix.SOCK_STREAM | unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK},
			{unix.AF_UNIX, unix.SOCK_DGRAM}, {unix.AF_UNIX, unix.SOCK_SEQPACKET}, {unix.AF_INET, unix.SOCK_STREAM},
		} {
			fd, err := unix.Socket(s.domain, s.kind, 0)
			fmt.Println(s, err)
			if err == nil && s.kind == unix.SOCK_DGRAM {
				fmt.Println("sendto", unix.Sendto(fd, []byte("x"), 0, &unix.SockaddrUnix{Name: args[1]}))
				fmt.Println("sendmsg", unix.Sendmsg(fd, []byte("x"), nil, &unix.SockaddrUnix{Name: args[1]}, 0))
			} else if err == nil {
				fmt.Println("bind", unix.Bind(fd, &unix.SockaddrUnix{Name: args[0]}), "connect", unix.Connect(fd, &unix.SockaddrUnix{Name: args[0]}))
				_ = unix.Unlink(args[0])
			}
		}
		return nil
	},
}

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		if child := children[os.Args[1]]; child != nil {
			if err := child(os.Args[2:]); err != nil {
				fmt.Println(err)
			}
			os.Exit(0)
		}
	}
	goleak.VerifyTestMain(m)
}

// ownProgram is this test's, where every user may execute it.
func ownProgram(t *testing.T) (path, dir string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("VMMs are confined by root")
	}
	dir, err := os.MkdirTemp("", "confine")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	require.NoError(t, os.Chmod(dir, 0o711))
	self, err := os.ReadFile("/proc/self/exe")
	require.NoError(t, err)
	path = filepath.Join(dir, "program")
	require.NoError(t, os.WriteFile(path, self, 0o755))
	return path, dir
}

// output runs a command to its end.
func output(t *testing.T, c Command) string {
	t.Helper()
	r, w, err := os.Pipe()
	require.NoError(t, err)
	c.Output = w
	execute, read := Program(c.Path)
	c.Execute, c.Read = append(c.Execute, execute...), append(c.Read, read...)
	p, err := Start(c)
	require.NoError(t, w.Close())
	require.NoError(t, err)
	out, err := io.ReadAll(r)
	require.NoError(t, err)
	require.NoError(t, r.Close())
	require.NoError(t, p.Wait())
	p.Seal()
	p.Seal()
	return string(out)
}

func field(status, name string) string {
	for line := range strings.Lines(status) {
		if rest, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(rest)
		}
	}
	return ""
}

// What restricts the program restricts no thread of ours.
func TestOnlyTheProgramIsRestricted(t *testing.T) {
	path, dir := ownProgram(t)
	before := threads(t)
	for range 20 {
		status := output(t, Command{Path: path, Args: []string{"status"}, Dir: dir, UID: testUID, Read: []string{"/proc"}, Threads: 64})
		require.Equal(t, fmt.Sprintf("%[1]d\t%[1]d\t%[1]d\t%[1]d", testUID), field(status, "Uid"))
		require.Equal(t, fmt.Sprintf("%[1]d\t%[1]d\t%[1]d\t%[1]d", testUID), field(status, "Gid"))
		require.Empty(t, field(status, "Groups"))
		require.Equal(t, "1", field(status, "NoNewPrivs"))
		require.Equal(t, "2", field(status, "Seccomp"))
		for _, set := range []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
			require.Equal(t, "0000000000000000", field(status, set), set)
		}
	}
	// The threads that were restricted end, a moment after their goroutines.
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		assert.Subset(c, before, threads(t), "no thread is left that is unlike the others")
	}, 10*time.Second, 10*time.Millisecond)
	_, err := os.ReadFile("/etc/passwd")
	require.NoError(t, err)
	status := output(t, Command{Path: path, Args: []string{"status"}, Dir: dir})
	require.Equal(t, "0\t0\t0\t0", field(status, "Uid"))
	require.NotEqual(t, "0000000000000000", field(status, "CapBnd"))
}

// threads are what the kernel tells of this process's threads, those that are alike as one.
func threads(t *testing.T) (list []string) {
	t.Helper()
	seen := map[string]bool{}
	files, err := filepath.Glob("/proc/self/task/*/status")
	require.NoError(t, err)
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		of := ""
		for _, name := range []string{"Uid", "CapInh", "CapBnd", "CapEff", "NoNewPrivs", "Seccomp"} {
			of += name + " " + field(string(text), name) + "; "
		}
		if !seen[of] {
			seen[of] = true
			list = append(list, of)
		}
	}
	return list
}

// Files are lent in the mode in which they are open, and no others are.
func TestLend(t *testing.T) {
	path, dir := ownProgram(t)
	var files []string
	lent := map[string]*os.File{}
	for name, flag := range map[string]int{"read": os.O_RDONLY, "write": os.O_RDWR, "other": -1} {
		file := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(file, []byte(name), 0o600))
		files = append(files, file)
		if flag >= 0 {
			f, err := os.OpenFile(file, flag, 0)
			require.NoError(t, err)
			defer f.Close()
			lent[file] = f
		}
	}
	out := output(t, Command{Path: path, Args: append([]string{"open"}, files...), Dir: dir, UID: testUID, Lend: lent})
	require.Contains(t, out, "/read bad file descriptor\n")
	require.Contains(t, out, "/write <nil>\n")
	require.Contains(t, out, "/other permission denied\n")
	for name, want := range map[string]string{"read": "read", "write": "xrite", "other": "other"} {
		got, err := os.ReadFile(filepath.Join(dir, name))
		require.NoError(t, err)
		require.Equal(t, want, string(got))
	}
}

func TestUnixSockets(t *testing.T) {
	path, dir := ownProgram(t)
	own := filepath.Join(dir, "own")
	require.NoError(t, os.Mkdir(own, 0o700))
	require.NoError(t, os.Chown(own, testUID, testUID))
	// A socket to which every user may send.
	open, err := os.MkdirTemp("", "open")
	require.NoError(t, err)
	defer os.RemoveAll(open)
	require.NoError(t, os.Chmod(open, 0o711))
	log, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(open, "log"), Net: "unixgram"})
	require.NoError(t, err)
	defer log.Close()
	require.NoError(t, os.Chmod(filepath.Join(open, "log"), 0o666))
	c := Command{Path: path, Args: []string{"sockets", filepath.Join(own, "s"), filepath.Join(open, "log")}, Dir: own, UID: testUID, Write: []string{own}}
	out := output(t, c)
	require.NotContains(t, out, "<nil>")
	require.Equal(t, 5, strings.Count(out, "operation not permitted"))
	c.UnixSockets = true
	out = output(t, c)
	require.Equal(t, 3, strings.Count(out, "} <nil>\n"), "unix sockets of streams and datagrams: %s", out)
	require.Contains(t, out, "sendto operation not permitted\nsendmsg operation not permitted\n", "to no address")
	require.Equal(t, 2, strings.Count(out, "bind <nil> connect operation not permitted"), "to listen only: %s", out)
}

// Sockets get names while a program starts.
func TestNamesEndWithTheStart(t *testing.T) {
	path, dir := ownProgram(t)
	r, w, err := os.Pipe()
	require.NoError(t, err)
	defer r.Close()
	execute, read := Program(path)
	p, err := Start(Command{Path: path, Args: []string{"names"}, Dir: dir, UID: testUID, Execute: execute, Read: read, UnixSockets: true, Output: w})
	require.NoError(t, w.Close())
	require.NoError(t, err)
	first := make([]byte, len("named\n"))
	_, err = io.ReadFull(r, first)
	require.NoError(t, err)
	require.Equal(t, "named\n", string(first))
	p.Seal()
	rest, err := io.ReadAll(r)
	require.NoError(t, err)
	require.NoError(t, p.Wait())
	require.Equal(t, unix.ENOSYS.Error()+"\n", strings.ReplaceAll(string(rest), "named\n", ""))
}

func TestStartFails(t *testing.T) {
	path, dir := ownProgram(t)
	_, err := Start(Command{Path: dir + "/missing", Dir: dir, UID: testUID})
	require.ErrorIs(t, err, os.ErrNotExist)
	closed := filepath.Join(dir, "closed")
	require.NoError(t, os.Mkdir(closed, 0o700))
	_, err = Start(Command{Path: path, Dir: closed, UID: testUID})
	require.ErrorIs(t, err, unix.EACCES, "it could not work there")
	require.ErrorContains(t, err, "others may not enter "+closed+", whose mode is 0700")
	require.NoError(t, Enterable(closed, testUID))
	output(t, Command{Path: path, Args: []string{"status"}, Dir: closed, UID: testUID})
	_, err = Start(Command{Path: path, Dir: dir, UID: testUID, Lend: map[string]*os.File{"x": os.Stdin}, Groups: make([]uint32, 1<<17)})
	require.Error(t, err, "more groups than there can be")
}

// An older kernel is asked for what it knows.
func TestKnown(t *testing.T) {
	t.Parallel()
	for version, want := range map[int]unix.LandlockRulesetAttr{
		1: {Access_fs: 0x1fff}, 2: {Access_fs: 0x3fff}, 3: {Access_fs: 0x7fff}, 4: {Access_fs: 0x7fff, Access_net: 3},
		5: {Access_fs: 0xffff, Access_net: 3}, 6: {Access_fs: 0xffff, Access_net: 3, Scoped: 3}, 9: {Access_fs: 0xffff, Access_net: 3, Scoped: 3},
	} {
		require.Equal(t, want, known(version), "version %d", version)
	}
}

func TestDeviceGroups(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("files are given to others by root")
	}
	path := filepath.Join(t.TempDir(), "kvm")
	require.NoError(t, os.WriteFile(path, nil, 0o600))
	for _, tc := range []struct {
		mode os.FileMode
		gid  int
		want []uint32
		bad  bool
	}{{0o600, 0, nil, true}, {0o660, 0, nil, true}, {0o660, 104, []uint32{104}, false}, {0o640, 104, nil, true}, {0o666, 104, nil, false}} {
		require.NoError(t, os.Chown(path, 0, tc.gid))
		require.NoError(t, os.Chmod(path, tc.mode))
		got, err := DeviceGroups(path)
		require.Equal(t, tc.want, got)
		require.Equal(t, tc.bad, errors.Is(err, errdefs.ErrFailedPrecondition), "%v", tc)
	}
	_, err := DeviceGroups(path + "2")
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
}

// BenchmarkStart compares how long a program takes to start, confined and not.
func BenchmarkStart(b *testing.B) {
	dir, err := os.MkdirTemp("", "confine")
	require.NoError(b, err)
	defer os.RemoveAll(dir)
	require.NoError(b, os.Chmod(dir, 0o711))
	memory, err := os.Open("/proc/self/exe")
	require.NoError(b, err)
	defer memory.Close()
	execute, read := Program("/usr/bin/true", "share/qemu")
	for name, c := range map[string]Command{
		"plain":    {Path: "/usr/bin/true", Dir: dir},
		"confined": {Path: "/usr/bin/true", Dir: dir, UID: testUID, Execute: execute, Read: read, Lend: map[string]*os.File{"/x": memory}},
	} {
		b.Run(name, func(b *testing.B) {
			for range b.N {
				p, err := Start(c)
				require.NoError(b, err)
				require.NoError(b, p.Wait())
				p.Seal()
			}
		})
	}
	runtime.KeepAlive(memory)
}
