// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package confine

import (
	"fmt"
	"runtime"
	"slices"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// denied are system calls that no VMM of ours needs after its start, nor for it. Its
// own filter denies more; this one is there from its first instruction, and whatever
// the VMM is told. They fail with EPERM.
var denied = []uint32{
	// Ways to other processes, and to the host's services. What a VMM talks to it
	// inherits, or it is accepted or handed over. io_uring would make and connect
	// sockets behind the filter's back.
	unix.SYS_CONNECT, unix.SYS_IO_URING_SETUP,
	unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_KCMP,
	unix.SYS_PIDFD_OPEN, unix.SYS_PIDFD_GETFD, unix.SYS_PIDFD_SEND_SIGNAL, unix.SYS_PROCESS_MADVISE,
	unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_NAME_TO_HANDLE_AT,
	// Namespaces and mounts.
	unix.SYS_UNSHARE, unix.SYS_SETNS, unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_CHROOT,
	unix.SYS_OPEN_TREE, unix.SYS_MOVE_MOUNT, unix.SYS_FSOPEN, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT, unix.SYS_FSPICK, unix.SYS_MOUNT_SETATTR,
	// Much of the kernel's code that only few need.
	unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD, unix.SYS_KEYCTL, unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY,
	unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE, unix.SYS_KEXEC_LOAD, unix.SYS_KEXEC_FILE_LOAD,
	unix.SYS_REBOOT, unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_SYSLOG, unix.SYS_ACCT, unix.SYS_QUOTACTL, unix.SYS_QUOTACTL_FD,
	unix.SYS_FANOTIFY_INIT, unix.SYS_LOOKUP_DCOOKIE, unix.SYS_VHANGUP,
	unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME, unix.SYS_CLOCK_ADJTIME, unix.SYS_ADJTIMEX,
	unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME, unix.SYS_OPEN_TREE_ATTR,
	// What Landlock has no rights for: modes, owners, times and attributes of files, its own
	// and those that are open to everybody, and what happens in directories that are.
	unix.SYS_FCHMOD, unix.SYS_FCHMODAT, unix.SYS_FCHMODAT2, unix.SYS_FCHOWN, unix.SYS_FCHOWNAT, unix.SYS_UTIMENSAT,
	unix.SYS_SETXATTR, unix.SYS_LSETXATTR, unix.SYS_FSETXATTR, unix.SYS_SETXATTRAT,
	unix.SYS_REMOVEXATTR, unix.SYS_LREMOVEXATTR, unix.SYS_FREMOVEXATTR, unix.SYS_REMOVEXATTRAT, fileSetAttr,
	unix.SYS_INOTIFY_INIT1, unix.SYS_INOTIFY_ADD_WATCH,
	// Memory, messages and semaphores that processes of all users share, as their modes let
	// them, and that outlive whoever made them.
	unix.SYS_SHMGET, unix.SYS_SHMAT, unix.SYS_SHMCTL, unix.SYS_SHMDT,
	unix.SYS_MSGGET, unix.SYS_MSGSND, unix.SYS_MSGRCV, unix.SYS_MSGCTL,
	unix.SYS_SEMGET, unix.SYS_SEMOP, unix.SYS_SEMTIMEDOP, unix.SYS_SEMCTL,
	unix.SYS_MQ_OPEN, unix.SYS_MQ_UNLINK, unix.SYS_MQ_TIMEDSEND, unix.SYS_MQ_TIMEDRECEIVE, unix.SYS_MQ_NOTIFY, unix.SYS_MQ_GETSETATTR,
}

// fileSetAttr is file_setattr (Linux 6.17).
const fileSetAttr = 469

// namespaces are the flags of clone that make one.
const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWUSER |
	unix.CLONE_NEWPID | unix.CLONE_NEWNET

// Offsets into struct seccomp_data: number, architecture, and the low halves of
// arguments, on the little-endian machines that we run on.
const (
	atNumber = 0
	atArch   = 4
	atArgs   = 16
)

// arch is what the kernel calls this architecture, and old what it has beside: the
// call open, which newer ones lack, others of that kind that are denied, and the first
// number of calls of another width.
type arch struct {
	audit   uint32
	oldOpen int
	denied  []uint32
	foreign uint32
}

var archs = map[string]arch{
	"amd64": {
		audit: unix.AUDIT_ARCH_X86_64, oldOpen: 2, foreign: 0x40000000,
		denied: []uint32{90 /* chmod */, 92 /* chown */, 94 /* lchown */, 132 /* utime */, 235 /* utimes */, 261 /* futimesat */, 253 /* inotify_init */},
	},
	"arm64": {audit: unix.AUDIT_ARCH_AARCH64, oldOpen: -1},
}

// assembler makes a filter, of steps that each decide or go on.
type assembler []unix.SockFilter

func (a *assembler) add(code uint16, k uint32, jt, jf uint8) {
	*a = append(*a, unix.SockFilter{Code: code, Jt: jt, Jf: jf, K: k})
}

func (a *assembler) load(offset uint32) { a.add(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, offset, 0, 0) }

func (a *assembler) answer(action uint32) { a.add(unix.BPF_RET|unix.BPF_K, action, 0, 0) }

// when answers if what is loaded compares so with k.
func (a *assembler) when(compare uint16, k, action uint32) {
	a.add(unix.BPF_JMP|compare|unix.BPF_K, k, 0, 1)
	a.answer(action)
}

// call runs steps, of which the last answers, for one system call.
func (a *assembler) call(number uint32, steps func(*assembler)) {
	var body assembler
	steps(&body)
	a.add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, number, 0, uint8(len(body)))
	*a = append(*a, body...)
}

func failing(errno unix.Errno) uint32 { return unix.SECCOMP_RET_ERRNO | uint32(errno) }

// program is the filter. With unixSockets it asks us about each name that a socket is to
// have, with lend about each opening for reading and writing.
func program(unixSockets, lend bool) ([]unix.SockFilter, error) {
	machine, ok := archs[runtime.GOARCH]
	if !ok {
		return nil, fmt.Errorf("no seccomp filter for %s: %w", runtime.GOARCH, errdefs.ErrNotImplemented)
	}
	var a assembler
	a.load(atArch)
	a.add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, machine.audit, 1, 0)
	a.answer(unix.SECCOMP_RET_KILL_PROCESS)
	a.load(atNumber)
	if machine.foreign != 0 {
		a.when(unix.BPF_JGE, machine.foreign, failing(unix.ENOSYS))
	}
	for _, number := range slices.Concat(denied, machine.denied) {
		a.when(unix.BPF_JEQ, number, failing(unix.EPERM))
	}
	// Its flags are out of a filter's sight; who gets ENOSYS uses clone.
	a.when(unix.BPF_JEQ, unix.SYS_CLONE3, failing(unix.ENOSYS))
	a.call(unix.SYS_CLONE, func(a *assembler) {
		a.load(atArgs)
		a.when(unix.BPF_JSET, namespaces, failing(unix.EPERM))
		a.answer(unix.SECCOMP_RET_ALLOW)
	})
	a.call(unix.SYS_SOCKET, func(a *assembler) {
		if unixSockets {
			const kind = 0xf // the rest are flags
			a.load(atArgs)
			a.add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, unix.AF_UNIX, 1, 0)
			a.answer(failing(unix.EPERM))
			a.load(atArgs + 8)
			a.add(unix.BPF_ALU|unix.BPF_AND|unix.BPF_K, kind, 0, 0)
			a.when(unix.BPF_JEQ, unix.SOCK_STREAM, unix.SECCOMP_RET_ALLOW)
			a.when(unix.BPF_JEQ, unix.SOCK_DGRAM, unix.SECCOMP_RET_ALLOW)
		}
		a.answer(failing(unix.EPERM))
	})
	if unixSockets {
		a.when(unix.BPF_JEQ, unix.SYS_BIND, unix.SECCOMP_RET_USER_NOTIF)
		a.noAddresses()
		a.pairs()
	} else {
		a.when(unix.BPF_JEQ, unix.SYS_BIND, failing(unix.EPERM))
		// From one of a pair it could send to any address, and needs sendmsg for else.
		a.when(unix.BPF_JEQ, unix.SYS_SOCKETPAIR, failing(unix.EPERM))
	}
	if lend {
		a.openings(machine)
	}
	a.answer(unix.SECCOMP_RET_ALLOW)
	return a, nil
}

// noAddresses keeps sockets from sending to where they are not connected. The address
// that sendmsg may have is out of a filter's sight.
func (a *assembler) noAddresses() {
	a.when(unix.BPF_JEQ, unix.SYS_SENDMSG, failing(unix.EPERM))
	a.when(unix.BPF_JEQ, unix.SYS_SENDMMSG, failing(unix.EPERM))
	a.call(unix.SYS_SENDTO, func(a *assembler) {
		const address, half = atArgs + 8*4, 4
		for _, part := range []uint32{address, address + half} {
			a.load(part)
			a.add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, 0, 1, 0)
			a.answer(failing(unix.EPERM))
		}
		a.answer(unix.SECCOMP_RET_ALLOW)
	})
}

// pairs keeps pairs of sockets to those that every program may have for itself.
func (a *assembler) pairs() {
	a.call(unix.SYS_SOCKETPAIR, func(a *assembler) {
		a.load(atArgs)
		a.when(unix.BPF_JEQ, unix.AF_UNIX, unix.SECCOMP_RET_ALLOW)
		a.answer(failing(unix.EPERM))
	})
}

// openings asks about files that are opened for reading and writing.
func (a *assembler) openings(machine arch) {
	ask := func(flags uint32) func(*assembler) {
		return func(a *assembler) {
			a.load(atArgs + 8*flags)
			a.add(unix.BPF_ALU|unix.BPF_AND|unix.BPF_K, unix.O_ACCMODE, 0, 0)
			a.when(unix.BPF_JEQ, unix.O_RDWR, unix.SECCOMP_RET_USER_NOTIF)
			a.answer(unix.SECCOMP_RET_ALLOW)
		}
	}
	if machine.oldOpen >= 0 {
		a.call(uint32(machine.oldOpen), ask(1))
	}
	a.call(unix.SYS_OPENAT, ask(2))
	// Its flags are out of a filter's sight.
	a.when(unix.BPF_JEQ, unix.SYS_OPENAT2, failing(unix.ENOSYS))
}

// install filters the calling thread's system calls, for good. If the filter asks, it
// returns the descriptor on which the kernel does, and else -1.
func install(filter []unix.SockFilter, asks bool) (listener int, _ error) {
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	flags := uintptr(0)
	if asks {
		flags = unix.SECCOMP_FILTER_FLAG_NEW_LISTENER
	}
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(pointer(&prog)))
	runtime.KeepAlive(filter)
	if errno != 0 {
		return -1, fmt.Errorf("install a seccomp filter: %w", errno)
	}
	if !asks {
		return -1, nil
	}
	return int(fd), nil
}

func seccomp(op, flags uintptr, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, op, flags, uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}

func ioctl(fd uintptr, request uint, arg unsafe.Pointer) error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, uintptr(request), uintptr(arg))
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return errno
		}
	}
}
