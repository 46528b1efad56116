// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package attack

import (
	"os"

	"golang.org/x/sys/unix"
)

// Files are attacks on files.
var Files = []Attack{
	{Name: "list another VM's directory", Do: Open(otherDir, unix.O_RDONLY|unix.O_DIRECTORY)},
	{Name: "read another VM's log", Do: Open(below(otherDir, "console.log"), unix.O_RDONLY)},
	{Name: "read another VM's disk", Do: Open(otherDisk, unix.O_RDONLY)},
	{Name: "write another VM's disk", Do: Open(otherDisk, unix.O_WRONLY)},
	{Name: "read its own record", Do: Open(record, unix.O_RDONLY)},
	{Name: "write its own record", Do: Open(record, unix.O_WRONLY)},
	{Name: "list its own directory", Do: Open(ownDir, unix.O_RDONLY|unix.O_DIRECTORY)},
	{Name: "make a file in its own directory", Do: Make(below(ownDir, "new"))},
	{Name: "rename in its own directory", Do: Rename(record)},
	{Name: "open its disk to others", Do: func(t *Targets) error { return unix.Chmod(t.Disk, 0o666) }},
	{Name: "make its disk a program of its user's", Do: func(t *Targets) error { return unix.Fchmodat(unix.AT_FDCWD, t.Disk, 0o4755, 0) }},
	{Name: "give its disk away", Do: func(t *Targets) error { return unix.Lchown(t.Disk, -1, os.Getgid()) }},
	{Name: "open the image for writing by its descriptor", Do: Again("/rootfs", unix.O_WRONLY)},
	{Name: "read and write the image", Do: Open(func(t *Targets) string { return t.Image }, unix.O_RDWR)},
	{Name: "read a file that everybody may read", Do: Open(laxFile, unix.O_RDONLY)},
	{Name: "write a file that everybody may write", Do: Open(laxFile, unix.O_WRONLY)},
	{Name: "truncate a file that everybody may write", Do: func(t *Targets) error { return unix.Truncate(t.LaxFile, 1) }},
	{Name: "touch a file that everybody may write", Do: func(t *Targets) error { return unix.UtimesNanoAt(unix.AT_FDCWD, t.LaxFile, nil, 0) }},
	{Name: "leave a word at a file that everybody may write", Do: func(t *Targets) error {
		return unix.Setxattr(t.LaxFile, "user.word", []byte("x"), 0)
	}, Alone: true}, // some file systems have no attributes
	{Name: "make a file where everybody may", Do: Make(below(laxDir, "new"))},
	{Name: "watch a directory that everybody may list", Do: func(t *Targets) error {
		fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
		if err != nil {
			return err
		}
		defer unix.Close(fd) //nolint:errcheck // nothing is written
		_, err = unix.InotifyAddWatch(fd, laxDir(t), unix.IN_ALL_EVENTS)
		return err
	}},
	{Name: "list the host's root", Do: Open(Static("/"), unix.O_RDONLY|unix.O_DIRECTORY)},
	{Name: "read /etc/passwd", Do: Open(Static("/etc/passwd"), unix.O_RDONLY)},
	{Name: "read /etc/shadow", Do: Open(Static("/etc/shadow"), unix.O_RDONLY)},
	{Name: "read init's memory", Do: Open(Static("/proc/1/mem"), unix.O_RDONLY), Alone: true},
	{Name: "read containerd's memory", Do: Open(proc(parent, "mem"), unix.O_RDONLY)},
	{Name: "read containerd's status", Do: Open(proc(parent, "status"), unix.O_RDONLY)},
	{Name: "read another VMM's environment", Do: Open(proc(other, "environ"), unix.O_RDONLY)},
	{Name: "write another VMM's memory", Do: Open(proc(other, "mem"), unix.O_WRONLY)},
	{Name: "list another VMM's files", Do: Open(proc(other, "fd"), unix.O_RDONLY|unix.O_DIRECTORY)},
	{Name: "list processes", Do: Open(Static("/proc"), unix.O_RDONLY|unix.O_DIRECTORY)},
	{Name: "make a TAP", Do: Open(Static("/dev/net/tun"), unix.O_RDWR)},
	{Name: "make a device", Do: Undone(
		func(t *Targets) error { return unix.Mknod(below(laxDir, "device")(t), unix.S_IFBLK|0o600, 0) },
		func(t *Targets) error { return unix.Unlink(below(laxDir, "device")(t)) },
	)},
}

// Snapshot are attacks on the snapshot that a VM was restored from, which its neighbours
// map too.
var Snapshot = []Attack{
	{Name: "write the snapshot by its path", Do: Open(memory, unix.O_WRONLY)},
	{Name: "open the snapshot to read and write once more", Do: Open(memory, unix.O_RDWR)},
	{Name: "open the snapshot for writing by its descriptor", Do: Again("/memory", unix.O_WRONLY)},
	{Name: "truncate the snapshot by its path", Do: func(t *Targets) error { return unix.Truncate(t.Memory, 4096) }},
	{Name: "change the snapshot's mode", Do: func(t *Targets) error { return unix.Fchmod(t.held, 0o600) }},
	{Name: "make a file beside the snapshot", Do: Make(func(t *Targets) string { return t.Memory + "2" })},
	{Name: "put something else in the snapshot's place", Do: Rename(memory)},
}

// Held are attacks on the snapshot by the descriptor that the VM has mapped it by.
var Held = []Attack{
	{Name: "write the snapshot", Do: func(t *Targets) error { _, err := unix.Pwrite(t.held, []byte("x"), 0); return err }},
	{Name: "map the snapshot shared", Do: func(t *Targets) error {
		_, err := unix.Mmap(t.held, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		return err
	}},
	{Name: "truncate the snapshot", Do: func(t *Targets) error { return unix.Ftruncate(t.held, 4096) }},
}
