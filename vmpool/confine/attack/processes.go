// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package attack

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Processes are attacks on processes, and on the attacker's own bounds.
var Processes = []Attack{
	{Name: "signal containerd", Do: signal(parent)},
	{Name: "signal another VMM", Do: signal(other)},
	{Name: "signal init", Do: signal(func(*Targets) int { return 1 })},
	{Name: "open another VMM as a pidfd", Do: func(t *Targets) error { _, err := unix.PidfdOpen(t.Other, 0); return err }},
	{Name: "trace another VMM", Do: func(t *Targets) error {
		runtime.LockOSThread()
		return unix.PtraceSeize(t.Other)
	}},
	{Name: "read another VMM's memory in place", Do: func(t *Targets) error {
		buf := make([]byte, 1)
		local := unix.Iovec{Base: &buf[0]}
		local.SetLen(1)
		_, err := unix.ProcessVMReadv(t.Other, []unix.Iovec{local}, []unix.RemoteIovec{{Base: uintptr(t.EchoedAddress), Len: 1}}, 0)
		return err
	}},
	{Name: "gain capabilities", Do: func(*Targets) error {
		head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		sets := [2]unix.CapUserData{{Effective: 1 << unix.CAP_DAC_OVERRIDE, Permitted: 1 << unix.CAP_DAC_OVERRIDE}}
		return unix.Capset(&head, &sets[0])
	}},
	{Name: "become root", Do: syscallOf(unix.SYS_SETRESUID, 0, 0, 0)},
	{Name: "join root's group", Do: syscallOf(unix.SYS_SETGROUPS, 0, 0)},
	{Name: "run a program", Do: func(t *Targets) error { return becomesRoot(t.SetUID) }},
	{Name: "become root by a program that is its own", Do: func(*Targets) error { return becomesRoot(os.Args[0]) }},
	{Name: "make a user namespace", Do: cloneUser, Alone: true},
	{Name: "unshare its namespaces", Do: syscallOf(unix.SYS_UNSHARE, unix.CLONE_NEWUTS)},
	{Name: "mount", Do: Undone(
		func(t *Targets) error { return unix.Mount("tmpfs", laxDir(t), "tmpfs", 0, "size=4k") },
		func(t *Targets) error { return unix.Unmount(laxDir(t), 0) },
	)},
	{Name: "go round filters by io_uring", Do: func(*Targets) error {
		var params [30]uint32
		return syscallOf(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params)))(nil)
	}, Alone: true},
	{Name: "load a BPF program", Do: syscallOf(unix.SYS_BPF, 0, 0, 0), Alone: true},
	{Name: "handle page faults", Do: syscallOf(unix.SYS_USERFAULTFD, 1), Alone: true},
	{Name: "attach shared memory that everybody may", Do: func(t *Targets) error {
		at, err := call(unix.SYS_SHMAT, uintptr(t.SharedMemory), 0, 0)
		if err == nil {
			_, _ = call(unix.SYS_SHMDT, at)
		}
		return err
	}},
	{Name: "make shared memory, which would outlive it", Do: madeAndRemoved(unix.SYS_SHMGET, unix.SYS_SHMCTL, 0, 4096, 0o600)},
	{Name: "make a message queue", Do: madeAndRemoved(unix.SYS_MSGGET, unix.SYS_MSGCTL, 0, 0o600)},
	{Name: "make semaphores", Do: func(*Targets) error {
		id, err := call(unix.SYS_SEMGET, 0, 1, 0o600)
		if err == nil {
			_, _ = call(unix.SYS_SEMCTL, id, 0, unix.IPC_RMID)
		}
		return err
	}},
	{Name: "make a message queue with a name", Do: func(*Targets) error {
		name := append([]byte("cloudhv-attack"), 0)
		fd, err := call(unix.SYS_MQ_OPEN, uintptr(unsafe.Pointer(&name[0])), unix.O_RDWR|unix.O_CREAT, 0o600, 0)
		if err == nil {
			_, _ = call(unix.SYS_MQ_UNLINK, uintptr(unsafe.Pointer(&name[0])))
			_ = unix.Close(int(fd))
		}
		return err
	}, Alone: true}, // a kernel may have none
}

// Sockets are attacks by sockets.
var Sockets = []Attack{
	{Name: "connect to a socket that everybody may use", Do: Dial("unix", func(t *Targets) string { return t.LaxSocket })},
	{Name: "send to a socket that everybody may use", Do: func(t *Targets) error {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd) //nolint:errcheck // what was sent was sent
		return unix.Sendto(fd, []byte("x"), 0, &unix.SockaddrUnix{Name: t.LaxDgram})
	}},
	{Name: "send to a socket that everybody may use, from one of a pair", Do: fromPair(func(t *Targets, fd int) error {
		return unix.Sendto(fd, []byte("x"), 0, &unix.SockaddrUnix{Name: t.LaxDgram})
	})},
	{Name: "send a message to a socket that everybody may use, from one of a pair", Do: fromPair(func(t *Targets, fd int) error {
		return unix.Sendmsg(fd, []byte("x"), nil, &unix.SockaddrUnix{Name: t.LaxDgram}, 0)
	})},
	{Name: "give one of a pair a name, to be sent to", Do: fromPair(func(t *Targets, fd int) error {
		return unix.Bind(fd, &unix.SockaddrUnix{Name: t.Abstract + "-pair"})
	})},
	{Name: "connect to an abstract socket", Do: Dial("unix", func(t *Targets) string { return t.Abstract })},
	{Name: "listen on an abstract socket", Do: Listen(func(t *Targets) string { return t.Abstract + "-own" })},
	{Name: "listen where everybody may make files", Do: Listen(below(laxDir, "own"))},
	{Name: "connect to another VM's monitor", Do: Dial("unix", func(t *Targets) string { return t.OtherSocket })},
	{Name: "connect to its own monitor", Do: Dial("unix", func(t *Targets) string { return t.OwnSocket })},
	{Name: "connect to the host's loopback", Do: Dial("tcp", func(t *Targets) string { return t.TCP })},
	{Name: "listen on the network", Do: func(*Targets) error {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err == nil {
			_ = l.Close()
		}
		return err
	}},
	{Name: "make a raw socket", Do: socket(unix.AF_INET, unix.SOCK_RAW), Alone: true},
	{Name: "make a packet socket", Do: socket(unix.AF_PACKET, unix.SOCK_RAW)},
	{Name: "make a netlink socket", Do: socket(unix.AF_NETLINK, unix.SOCK_RAW)},
	{Name: "make a vsock", Do: socket(unix.AF_VSOCK, unix.SOCK_STREAM), Alone: true},
	{Name: "make a pair of another kind", Do: func(*Targets) error {
		_, err := unix.Socketpair(unix.AF_TIPC, unix.SOCK_STREAM, 0)
		return err
	}, Alone: true},
}

func socket(domain, kind int) func(*Targets) error {
	return func(*Targets) error {
		fd, err := unix.Socket(domain, kind, 0)
		if err == nil {
			_ = unix.Close(fd)
		}
		return err
	}
}

// fromPair does something with a datagram socket that no call of socket has made.
func fromPair(do func(*Targets, int) error) func(*Targets) error {
	return func(t *Targets) error {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
		if err != nil {
			return err
		}
		defer unix.Close(pair[0]) //nolint:errcheck // what was sent was sent
		defer unix.Close(pair[1]) //nolint:errcheck // nothing was
		return do(t, pair[0])
	}
}

// madeAndRemoved makes one of the things of System V's, with a key of no one's.
func madeAndRemoved(get, control uintptr, args ...uintptr) func(*Targets) error {
	return func(*Targets) error {
		id, err := call(get, args...)
		if err == nil {
			_, _ = call(control, id, unix.IPC_RMID, 0)
		}
		return err
	}
}

// cloneUser makes a process in a user namespace of its own, which ends.
func cloneUser(*Targets) error {
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

// whoAmI, as its argument, makes this program tell its user.
const whoAmI = "-who-am-i"

// becomesRoot runs a program that belongs to root and says so by its mode.
func becomesRoot(path string) error {
	var out bytes.Buffer
	cmd := exec.Command(path, whoAmI) //nolint:gosec // an attacker chooses
	cmd.Stdout = &out
	if err := cmd.Run(); err != nil {
		return err
	}
	if out.String() != "0" {
		return fmt.Errorf("it runs as user %s: %w", out.String(), unix.EPERM)
	}
	return nil
}
