// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package attack plays a VMM that its guest has taken over, for the tests of drivers:
// the test's own program, which a driver has started in its hypervisor's place, tries
// what such a VMM must not be able to do, and tells what came of it. One that is not
// confined tries the same, and can: so the attempts are ones.
package attack

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Targets are what an attacker goes for. Files and sockets of the lax directory are
// open to every user of the host, and so is the shared memory.
type Targets struct {
	// Parent and Other are processes: containerd's, another VMM.
	Parent, Other int
	// OwnDir and OtherDir are directories of VMs, Disk and OtherDisk their disks, OwnSocket
	// and OtherSocket where their VMMs are controlled.
	OwnDir, OtherDir       string
	Disk, OtherDisk        string
	OwnSocket, OtherSocket string
	// Memory is the snapshot's, Image the guest's, Record the VM's.
	Memory, Image, Record string

	LaxFile, LaxSocket, LaxDgram string
	Abstract, TCP, SetUID        string
	SharedMemory                 int
	// EchoedAddress is where the other VMM has a byte that can be read.
	EchoedAddress uint64

	// Files are targets of a driver's own attacks, by names that it chooses.
	Files map[string]string

	// MemoryBytes and Processes are how many it is to take, instead of all else.
	MemoryBytes, Processes int

	// held is VMM.Memory.
	held int
}

// Attack is something that a VMM must not be able to do: it fails, or it was done. What
// a VMM must be able to do is written in the same way.
type Attack struct {
	Name string
	Do   func(*Targets) error
	// Alone is true for what an unconfined root need not be able to do either here.
	Alone bool
}

// Undone is an attack that is undone, so that another one finds what it looks for. It
// counts as done whether or not it can be undone.
func Undone(do, undo func(*Targets) error) func(*Targets) error {
	return func(t *Targets) error {
		err := do(t)
		if err == nil {
			_ = undo(t)
		}
		return err
	}
}

// Open opens what a path leads to.
func Open(path func(*Targets) string, flag int) func(*Targets) error {
	return func(t *Targets) error {
		fd, err := unix.Open(path(t), flag|unix.O_CLOEXEC, 0o600)
		if err == nil {
			_ = unix.Close(fd)
		}
		return err
	}
}

// Make makes a file, and removes it.
func Make(path func(*Targets) string) func(*Targets) error {
	return Undone(Open(path, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL), func(t *Targets) error { return os.Remove(path(t)) })
}

// Rename renames a file, and back.
func Rename(path func(*Targets) string) func(*Targets) error {
	return Undone(func(t *Targets) error { return os.Rename(path(t), path(t)+"2") }, func(t *Targets) error { return os.Rename(path(t)+"2", path(t)) })
}

// Link makes a file's other name by os.Link or os.Symlink, and removes it.
func Link(link func(from, to string) error, from, to func(*Targets) string) func(*Targets) error {
	return Undone(func(t *Targets) error { return link(from(t), to(t)) }, func(t *Targets) error { return os.Remove(to(t)) })
}

// Static is a target that is the same everywhere.
func Static(path string) func(*Targets) string { return func(*Targets) string { return path } }

// File is one of Targets.Files.
func File(name string) func(*Targets) string { return func(t *Targets) string { return t.Files[name] } }

// Again opens a file anew that it has, which is known by how its path ends.
func Again(suffix string, flag int) func(*Targets) error {
	return func(*Targets) error {
		fd, err := findFile(suffix)
		if err != nil {
			return err
		}
		return Open(Static(ownFile(fd)), flag)(nil)
	}
}

func findFile(suffix string) (int, error) {
	for fd := range 64 {
		name, err := os.Readlink(ownFile(fd))
		if err == nil && strings.HasSuffix(name, suffix) {
			return fd, nil
		}
	}
	return 0, fmt.Errorf("no file %s: %w", suffix, unix.EBADF)
}

func ownFile(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// Dial connects to a socket.
func Dial(network string, address func(*Targets) string) func(*Targets) error {
	return func(t *Targets) error {
		c, err := net.DialTimeout(network, address(t), 5*time.Second)
		if err == nil {
			_ = c.Close()
		}
		return err
	}
}

// Listen makes a unix socket, and removes it.
func Listen(address func(*Targets) string) func(*Targets) error {
	return func(t *Targets) error {
		l, err := net.Listen("unix", address(t))
		if err == nil {
			_ = l.Close()
		}
		return err
	}
}

func signal(pid func(*Targets) int) func(*Targets) error {
	return func(t *Targets) error { return unix.Kill(pid(t), 0) }
}

func parent(t *Targets) int { return t.Parent }

func other(t *Targets) int { return t.Other }

func ownDir(t *Targets) string { return t.OwnDir }

func otherDir(t *Targets) string { return t.OtherDir }

func otherDisk(t *Targets) string { return t.OtherDisk }

func record(t *Targets) string { return t.Record }

func memory(t *Targets) string { return t.Memory }

func laxFile(t *Targets) string { return t.LaxFile }

func below(dir func(*Targets) string, name string) func(*Targets) string {
	return func(t *Targets) string { return filepath.Join(dir(t), name) }
}

func laxDir(t *Targets) string { return filepath.Dir(t.LaxFile) }

func proc(pid func(*Targets) int, name string) func(*Targets) string {
	return func(t *Targets) string { return filepath.Join("/proc", strconv.Itoa(pid(t)), name) }
}

func syscallOf(number uintptr, args ...uintptr) func(*Targets) error {
	return func(*Targets) error {
		_, err := call(number, args...)
		return err
	}
}

func call(number uintptr, args ...uintptr) (uintptr, error) {
	var a [6]uintptr
	copy(a[:], args)
	r, _, errno := unix.RawSyscall6(number, a[0], a[1], a[2], a[3], a[4], a[5])
	if errno != 0 {
		return 0, errno
	}
	return r, nil
}
