// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package qemu

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// This file is what runs in QEMU's place when a guest has taken it over: the test's
// own program, started by the driver with QEMU's command line. It tries what it is
// asked for on its monitor's socket.

// targets are what an attacker goes for. Files and sockets of the lax directory are
// open to every user of the host.
type targets struct {
	Parent, Other                int // processes: containerd's, another VMM
	OwnDir, OtherDir, OtherDisk  string
	Memory, Image, Record        string
	LaxFile, LaxSocket, LaxDgram string
	Abstract, TCP                string
	SetUID                       string
	MemoryBytes, Processes       int
	EchoedAddress                uint64
}

// attack is something that a VMM must not be able to do: it fails, or it was done.
type attack struct {
	name string
	do   func(*targets) error
	// alone is true for what an unconfined root need not be able to do either here.
	alone bool
}

func opening(path func(*targets) string, flag int) func(*targets) error {
	return func(t *targets) error {
		fd, err := unix.Open(path(t), flag|unix.O_CLOEXEC, 0o600)
		if err == nil {
			err = unix.Close(fd)
		}
		return err
	}
}

func static(path string) func(*targets) string { return func(*targets) string { return path } }

// inherited is an inherited file, by how its path ends, opened anew.
func again(suffix string, flag int) func(*targets) error {
	return func(*targets) error {
		fd, err := findFile(suffix)
		if err != nil {
			return err
		}
		return opening(static(ownFile(fd)), flag)(nil)
	}
}

// lent is the guest's memory as QEMU has it.
var lent = -1

func findFile(suffix string) (int, error) {
	for fd := range 64 {
		name, err := os.Readlink(ownFile(fd))
		if err == nil && strings.HasSuffix(name, suffix) {
			return fd, nil
		}
	}
	return 0, fmt.Errorf("no file %s: %w", suffix, unix.EBADF)
}

func signal(pid func(*targets) int) func(*targets) error {
	return func(t *targets) error { return unix.Kill(pid(t), 0) }
}

func parent(t *targets) int { return t.Parent }

func other(t *targets) int { return t.Other }

func proc(pid func(*targets) int, name string) func(*targets) string {
	return func(t *targets) string { return filepath.Join("/proc", strconv.Itoa(pid(t)), name) }
}

func syscallOf(number uintptr, args ...uintptr) func(*targets) error {
	return func(*targets) error {
		var a [6]uintptr
		copy(a[:], args)
		r, _, errno := unix.RawSyscall6(number, a[0], a[1], a[2], a[3], a[4], a[5])
		if errno != 0 {
			return errno
		}
		_ = r
		return nil
	}
}

// cloneUser makes a process in a user namespace of its own, which ends.
func cloneUser(*targets) error {
	pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, unix.CLONE_NEWUSER|uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 {
		return errno
	}
	if pid == 0 {
		for {
			_, _, _ = unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
		}
	}
	_, err := unix.Wait4(int(pid), nil, 0, nil)
	return err
}

func socket(domain, kind int) func(*targets) error {
	return func(*targets) error {
		fd, err := unix.Socket(domain, kind, 0)
		if err == nil {
			err = unix.Close(fd)
		}
		return err
	}
}

func dial(network string, address func(*targets) string) func(*targets) error {
	return func(t *targets) error {
		c, err := net.DialTimeout(network, address(t), 5*time.Second)
		if err == nil {
			err = c.Close()
		}
		return err
	}
}

// fileAttacks are on files.
var fileAttacks = []attack{
	{name: "list another VM's directory", do: opening(func(t *targets) string { return t.OtherDir }, unix.O_RDONLY|unix.O_DIRECTORY)},
	{name: "read another VM's log", do: opening(func(t *targets) string { return t.OtherDir + "/console.log" }, unix.O_RDONLY)},
	{name: "read another VM's disk", do: opening(func(t *targets) string { return t.OtherDisk }, unix.O_RDONLY)},
	{name: "write another VM's disk", do: opening(func(t *targets) string { return t.OtherDisk }, unix.O_WRONLY)},
	{name: "read its own record", do: opening(func(t *targets) string { return t.Record }, unix.O_RDONLY)},
	{name: "write its own record", do: opening(func(t *targets) string { return t.Record }, unix.O_WRONLY)},
	{name: "make a file in its own directory", do: opening(func(t *targets) string { return t.OwnDir + "/new" }, unix.O_WRONLY|unix.O_CREAT)},
	{name: "rename in its own directory", do: func(t *targets) error {
		return errors.Join(os.Rename(t.Record, t.Record+"2"), os.Rename(t.Record+"2", t.Record))
	}},
	{name: "read the snapshot by its path", do: opening(func(t *targets) string { return t.Memory }, unix.O_RDONLY)},
	{name: "write the snapshot by its path", do: opening(func(t *targets) string { return t.Memory }, unix.O_WRONLY)},
	{name: "open the snapshot to read and write once more", do: opening(func(t *targets) string { return t.Memory }, unix.O_RDWR)},
	{name: "open the snapshot for writing by its descriptor", do: again("/memory", unix.O_WRONLY)},
	{name: "write the snapshot", do: func(*targets) error { _, err := unix.Pwrite(lent, []byte("x"), 0); return err }},
	{name: "map the snapshot shared", do: func(*targets) error {
		_, err := unix.Mmap(lent, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		return err
	}},
	{name: "truncate the snapshot", do: func(*targets) error { return unix.Ftruncate(lent, 4096) }},
	{name: "change the snapshot's mode", do: func(*targets) error { return unix.Fchmod(lent, 0o600) }},
	{name: "open the image for writing by its descriptor", do: again("/rootfs", unix.O_WRONLY)},
	{name: "read and write the image", do: opening(func(t *targets) string { return t.Image }, unix.O_RDWR)},
	{name: "read a file that everybody may read", do: opening(func(t *targets) string { return t.LaxFile }, unix.O_RDONLY)},
	{name: "write a file that everybody may write", do: opening(func(t *targets) string { return t.LaxFile }, unix.O_WRONLY)},
	{name: "truncate a file that everybody may write", do: func(t *targets) error { return unix.Truncate(t.LaxFile, 1) }},
	{name: "make a file where everybody may", do: opening(func(t *targets) string { return filepath.Dir(t.LaxFile) + "/new" }, unix.O_WRONLY|unix.O_CREAT)},
	{name: "list the host's root", do: opening(static("/"), unix.O_RDONLY|unix.O_DIRECTORY)},
	{name: "read /etc/passwd", do: opening(static("/etc/passwd"), unix.O_RDONLY)},
	{name: "read /etc/shadow", do: opening(static("/etc/shadow"), unix.O_RDONLY)},
	{name: "read init's memory", do: opening(static("/proc/1/mem"), unix.O_RDONLY), alone: true},
	{name: "read containerd's memory", do: opening(proc(parent, "mem"), unix.O_RDONLY)},
	{name: "read containerd's status", do: opening(proc(parent, "status"), unix.O_RDONLY)},
	{name: "read another VMM's environment", do: opening(proc(other, "environ"), unix.O_RDONLY)},
	{name: "write another VMM's memory", do: opening(proc(other, "mem"), unix.O_WRONLY)},
	{name: "list another VMM's files", do: opening(proc(other, "fd"), unix.O_RDONLY|unix.O_DIRECTORY)},
	{name: "list processes", do: opening(static("/proc"), unix.O_RDONLY|unix.O_DIRECTORY)},
	{name: "make a TAP", do: opening(static("/dev/net/tun"), unix.O_RDWR)},
	{name: "make a device", do: func(t *targets) error {
		path := filepath.Dir(t.LaxFile) + "/device"
		return errors.Join(unix.Mknod(path, unix.S_IFBLK|0o600, 0), unix.Unlink(path))
	}},
}

// processAttacks are on processes, and on the attacker's own bounds.
var processAttacks = []attack{
	{name: "signal containerd", do: signal(parent)},
	{name: "signal another VMM", do: signal(other)},
	{name: "signal init", do: signal(func(*targets) int { return 1 })},
	{name: "open another VMM as a pidfd", do: func(t *targets) error { _, err := unix.PidfdOpen(t.Other, 0); return err }},
	{name: "trace another VMM", do: func(t *targets) error {
		runtime.LockOSThread()
		return errors.Join(unix.PtraceSeize(t.Other), syscallOf(unix.SYS_TKILL, uintptr(t.Other), 0)(t))
	}},
	{name: "read another VMM's memory in place", do: func(t *targets) error {
		buf := make([]byte, 1)
		local := unix.Iovec{Base: &buf[0]}
		local.SetLen(1)
		_, err := unix.ProcessVMReadv(t.Other, []unix.Iovec{local}, []unix.RemoteIovec{{Base: uintptr(t.EchoedAddress), Len: 1}}, 0)
		return err
	}},
	{name: "gain capabilities", do: func(*targets) error {
		head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		sets := [2]unix.CapUserData{{Effective: 1 << unix.CAP_DAC_OVERRIDE, Permitted: 1 << unix.CAP_DAC_OVERRIDE}}
		return unix.Capset(&head, &sets[0])
	}},
	{name: "become root", do: syscallOf(unix.SYS_SETRESUID, 0, 0, 0)},
	{name: "join root's group", do: syscallOf(unix.SYS_SETGROUPS, 0, 0)},
	{name: "run a program", do: func(t *targets) error { return becomesRoot(t.SetUID) }},
	{name: "become root by a program that is its own", do: func(*targets) error { return becomesRoot(os.Args[0]) }},
	{name: "make a user namespace", do: cloneUser, alone: true},
	{name: "unshare its namespaces", do: syscallOf(unix.SYS_UNSHARE, unix.CLONE_NEWUTS)},
	{name: "mount", do: func(t *targets) error {
		dir := filepath.Dir(t.LaxFile)
		return errors.Join(unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4k"), unix.Unmount(dir, 0))
	}},
	{name: "go round filters by io_uring", do: func(*targets) error {
		var params [30]uint32
		return syscallOf(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params)))(nil)
	}, alone: true},
	{name: "load a BPF program", do: syscallOf(unix.SYS_BPF, 0, 0, 0), alone: true},
	{name: "handle page faults", do: syscallOf(unix.SYS_USERFAULTFD, 1), alone: true},
	{name: "connect to a socket that everybody may use", do: dial("unix", func(t *targets) string { return t.LaxSocket })},
	{name: "send to a socket that everybody may use", do: func(t *targets) error {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
		if err != nil {
			return err
		}
		return unix.Sendto(fd, []byte("x"), 0, &unix.SockaddrUnix{Name: t.LaxDgram})
	}},
	{name: "connect to an abstract socket", do: dial("unix", func(t *targets) string { return t.Abstract })},
	{name: "connect to another VM's monitor", do: dial("unix", func(t *targets) string { return t.OtherDir + "/" + monitorSocket })},
	{name: "connect to its own monitor", do: dial("unix", func(t *targets) string { return t.OwnDir + "/" + monitorSocket })},
	{name: "connect to the host's loopback", do: dial("tcp", func(t *targets) string { return t.TCP })},
	{name: "listen on the network", do: func(*targets) error {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err == nil {
			err = l.Close()
		}
		return err
	}},
	{name: "make a raw socket", do: socket(unix.AF_INET, unix.SOCK_RAW), alone: true},
	{name: "make a packet socket", do: socket(unix.AF_PACKET, unix.SOCK_RAW)},
	{name: "make a netlink socket", do: socket(unix.AF_NETLINK, unix.SOCK_RAW)},
	{name: "make a vsock", do: socket(unix.AF_VSOCK, unix.SOCK_STREAM), alone: true},
}

// whoAmI, as its argument, makes this program tell its user.
const whoAmI = "-who-am-i"

// becomesRoot runs a program that belongs to root and says so by its mode.
func becomesRoot(path string) error {
	var out bytes.Buffer
	cmd := exec.Command(path, whoAmI)
	cmd.Stdout = &out
	if err := cmd.Run(); err != nil {
		return err
	}
	if out.String() != "0" {
		return fmt.Errorf("it runs as user %s: %w", out.String(), unix.EPERM)
	}
	return nil
}

// echoed is read from another process's memory.
var echoed = [1]byte{42}

// attacker takes QEMU's place, if this process is to.
func attacker() {
	if slices.Contains(os.Args, whoAmI) {
		fmt.Print(syscall.Geteuid())
		os.Exit(0)
	}
	if !slices.Contains(os.Args, "-nodefaults") {
		return
	}
	if err := serveAttacks(); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(1)
}

func serveAttacks() error {
	for _, arg := range os.Args {
		if _, path, ok := strings.Cut(arg, "mem-path="); ok {
			fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err != nil {
				return fmt.Errorf("QEMU would not start: %w", err)
			}
			lent = fd
			if _, err := unix.Mmap(lent, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE); err != nil {
				return fmt.Errorf("QEMU would not start: %w", err)
			}
		}
	}
	l, err := net.FileListener(os.NewFile(fdMonitor, monitorSocket))
	if err != nil {
		return err
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		var t targets
		if err := json.NewDecoder(conn).Decode(&t); err != nil {
			return err
		}
		if err := json.NewEncoder(conn).Encode(act(&t)); err != nil {
			return err
		}
		_ = conn.Close()
	}
}

// act does what is asked for and tells what came of each: "" if it was done.
func act(t *targets) map[string]string {
	results := map[string]string{"address": fmt.Sprint(uintptr(unsafe.Pointer(&echoed)))}
	switch {
	case t.Processes > 0:
		results["processes"] = fmt.Sprint(forkMany(t.Processes))
	case t.MemoryBytes > 0:
		useMemory(t.MemoryBytes)
		results["memory"] = ""
	case t.OwnDir != "":
		for _, a := range slices.Concat(fileAttacks, processAttacks) {
			results[a.name] = ""
			if err := inThread(func() error { return a.do(t) }); err != nil {
				results[a.name] = err.Error()
			}
		}
	}
	return results
}

// inThread runs what may change its thread, which ends then.
func inThread(do func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		done <- do()
	}()
	return <-done
}

// forkMany starts processes that wait for good, and tells how many came to be.
func forkMany(most int) (count int) {
	for ; count < most; count++ {
		pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
		if errno != 0 {
			return count
		}
		if pid == 0 {
			for {
				_, _, _ = unix.RawSyscall(unix.SYS_PPOLL, 0, 0, 0)
			}
		}
	}
	return count
}

// useMemory writes to so much of it.
func useMemory(bytes int) {
	data, err := unix.Mmap(-1, 0, bytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return
	}
	for i := 0; i < len(data); i += 4096 {
		data[i] = 1
	}
}
