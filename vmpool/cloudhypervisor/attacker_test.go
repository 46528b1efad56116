// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package cloudhypervisor

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/vmpool/confine/attack"
)

// This file is what runs in Cloud Hypervisor's place when a guest has taken it over: the
// test's own program, started by the driver with the hypervisor's command line. It starts
// as that does, answers the API as the fake does, and tries what it is asked for there.

// Names of targets.
const (
	targetOwn, targetOtherOwn     = "own", "other own"
	targetDisks, targetOtherDisks = "disks", "other disks"
	targetKernel, targetConfig    = "kernel", "config"
	targetTakenBack, targetGroup  = "taken back", "group"
)

// Serials of disks that the tests plug.
const (
	lentImage  = "lent-image"
	lentVolume = "lent-volume"
	takenBack  = "taken-back"
)

func in(dir, name string) func(*attack.Targets) string {
	return func(t *attack.Targets) string { return filepath.Join(t.Files[dir], name) }
}

// ownAttacks are on what Cloud Hypervisor has by its path, and on where that is.
var ownAttacks = []attack.Attack{
	{Name: "list its working directory", Do: attack.Open(in(targetOwn, ""), unix.O_RDONLY|unix.O_DIRECTORY)},
	{Name: "open its working directory to others", Do: func(t *attack.Targets) error { return unix.Chmod(in(targetOwn, "")(t), 0o711) }},
	{Name: "make a file in its working directory", Do: attack.Make(in(targetOwn, "new"))},
	{Name: "make a directory in its working directory", Do: attack.Undone(
		func(t *attack.Targets) error { return unix.Mkdir(in(targetOwn, "new")(t), 0o700) },
		func(t *attack.Targets) error { return unix.Rmdir(in(targetOwn, "new")(t)) },
	)},
	{Name: "make a socket in its working directory", Do: attack.Listen(in(targetOwn, "new.sock"))},
	{Name: "make a link in its working directory", Do: attack.Link(os.Symlink, attack.Static(guestSocket), in(targetOwn, "new"))},
	{Name: "give its guest's socket another name", Do: attack.Link(os.Link, in(targetOwn, guestSocket), in(targetOwn, "new"))},
	{Name: "give another VM's socket a name of its own", Do: attack.Link(os.Link, in(targetOtherOwn, guestSocket), in(targetOwn, "new"))},
	{Name: "rename its guest's socket", Do: attack.Rename(in(targetOwn, guestSocket))},
	{Name: "rename its console", Do: attack.Rename(in(targetOwn, consoleSocket))},
	{Name: "connect to its own guest's socket", Do: attack.Dial("unix", in(targetOwn, guestSocket))},
	{Name: "connect to its own console", Do: attack.Dial("unix", in(targetOwn, consoleSocket))},
	{Name: "connect to another VM's guest", Do: attack.Dial("unix", in(targetOtherOwn, guestSocket))},
	{Name: "connect to another VM's console", Do: attack.Dial("unix", in(targetOtherOwn, consoleSocket))},
	{Name: "list another VM's working directory", Do: attack.Open(in(targetOtherOwn, ""), unix.O_RDONLY|unix.O_DIRECTORY)},
	{Name: "write the image", Do: attack.Open(func(t *attack.Targets) string { return t.Image }, unix.O_WRONLY)},
	{Name: "write the kernel", Do: attack.Open(attack.File(targetKernel), unix.O_WRONLY)},
	{Name: "list the disks that are plugged", Do: attack.Open(in(targetDisks, ""), unix.O_RDONLY|unix.O_DIRECTORY)},
	{Name: "make a file beside the disks that are plugged", Do: attack.Make(in(targetDisks, "new"))},
	{Name: "rename a disk that is plugged", Do: attack.Rename(in(targetDisks, lentVolume))},
	{Name: "write a plugged disk that is only to read", Do: attack.Open(in(targetDisks, lentImage), unix.O_WRONLY)},
	{Name: "truncate a plugged disk that is only to read", Do: func(t *attack.Targets) error { return unix.Truncate(in(targetDisks, lentImage)(t), 64<<10) }},
	{Name: "open a plugged disk to others", Do: func(t *attack.Targets) error { return unix.Chmod(in(targetDisks, lentVolume)(t), 0o666) }},
	{Name: "list another VM's plugged disks", Do: attack.Open(in(targetOtherDisks, ""), unix.O_RDONLY|unix.O_DIRECTORY)},
	{Name: "read another VM's plugged image", Do: attack.Open(in(targetOtherDisks, lentImage), unix.O_RDONLY)},
	{Name: "write another VM's plugged disk", Do: attack.Open(in(targetOtherDisks, lentVolume), unix.O_RDWR)},
	{Name: "plug another VM's disk into itself", Do: attack.Link(os.Link, in(targetOtherDisks, lentVolume), in(targetDisks, "stolen"))},
	{Name: "open a disk that was taken back", Do: attack.Open(in(targetDisks, takenBack), unix.O_RDWR), Alone: true}, // it has no such name
	{Name: "open a disk that was taken back, by its first name", Do: attack.Open(attack.File(targetTakenBack), unix.O_RDWR)},
}

// configAttacks are on the rest of a snapshot.
var configAttacks = []attack.Attack{
	{Name: "write the snapshot's configuration", Do: attack.Open(attack.File(targetConfig), unix.O_WRONLY)},
	{Name: "put another configuration in its place", Do: attack.Rename(attack.File(targetConfig))},
}

// needs are what the hypervisor must be able to do while its VM runs, or it would be
// safe and of no use.
var needs = []attack.Attack{
	{Name: "open its disk", Do: attack.Open(func(t *attack.Targets) string { return t.Disk }, unix.O_RDWR)},
	{Name: "write its disk, and punch holes into it", Do: func(t *attack.Targets) error { return useDisk(t.Disk) }},
	{Name: "read the image", Do: attack.Open(func(t *attack.Targets) string { return t.Image }, unix.O_RDONLY)},
	{Name: "read a plugged disk", Do: attack.Open(in(targetDisks, lentImage), unix.O_RDONLY)},
	{Name: "write a plugged disk", Do: func(t *attack.Targets) error { return useDisk(in(targetDisks, lentVolume)(t)) }},
	{Name: "use /dev/null", Do: attack.Open(attack.Static(os.DevNull), unix.O_RDWR)},
	{Name: "draw random numbers", Do: attack.Open(attack.Static("/dev/urandom"), unix.O_RDONLY)},
	{Name: "look at the host's huge pages", Do: attack.Open(attack.Static("/sys/kernel/mm"), unix.O_RDONLY|unix.O_DIRECTORY)},
	{Name: "look at the host's processors", Do: attack.Open(attack.Static("/sys/devices/system/cpu"), unix.O_RDONLY|unix.O_DIRECTORY)},
	{Name: "make a socket for ioctl", Do: func(*attack.Targets) error {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
		return errors.Join(err, unix.Close(fd))
	}},
	{Name: "make a pair of sockets, and send", Do: func(*attack.Targets) error {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		return errors.Join(unix.Send(pair[0], []byte("x"), 0), unix.Close(pair[0]), unix.Close(pair[1]))
	}},
	{Name: "make a memory file", Do: func(*attack.Targets) error {
		fd, err := unix.MemfdCreate("ram", unix.MFD_CLOEXEC)
		return errors.Join(err, unix.Ftruncate(fd, 1<<20), unix.Close(fd))
	}},
}

// restoredNeeds are those of one that is restored, templateNeeds of one that is to become
// a snapshot.
var (
	restoredNeeds = []attack.Attack{
		{Name: "read the snapshot", Do: attack.Open(func(t *attack.Targets) string { return t.Memory }, unix.O_RDONLY)},
		{Name: "read the snapshot's configuration", Do: attack.Open(attack.File(targetConfig), unix.O_RDONLY)},
	}
	templateNeeds = []attack.Attack{
		{Name: "write the guest's memory", Do: attack.Held[0].Do},
		{Name: "write a file of the snapshot's", Do: attack.Make(func(t *attack.Targets) string { return t.Memory + "-ranges" })},
	}
)

// deviceAttacks and deviceNeeds are about /dev/kvm.
var (
	deviceAttacks = []attack.Attack{{Name: "open another device of that group", Do: attack.Open(attack.Static("/dev/other"), unix.O_RDWR)}}
	deviceNeeds   = []attack.Attack{
		{Name: "open the accelerator's device", Do: attack.Open(attack.Static("/dev/kvm"), unix.O_RDWR)},
		{Name: "be in that device's group, and in no other", Do: func(t *attack.Targets) error {
			groups, err := unix.Getgroups()
			if err == nil && (len(groups) != 1 || strconv.Itoa(groups[0]) != t.Files[targetGroup]) {
				err = fmt.Errorf("it is in %v: %w", groups, unix.EPERM)
			}
			return err
		}, Alone: true},
	}
)

func useDisk(path string) error {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	_, err = unix.Pwrite(fd, []byte("x"), 4096)
	return errors.Join(err, unix.Fdatasync(fd), unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096), unix.Close(fd))
}

// attacker takes the hypervisor's place, if this process is to.
func attacker() {
	attack.Main()
	if !slices.Contains(os.Args, "--api-socket") {
		return
	}
	fmt.Fprintln(os.Stderr, "taken over:", takenOver())
	os.Exit(1)
}

// takenOver opens what the hypervisor would, as that would, and does what it is told.
func takenOver() error {
	v := attack.VMM{Memory: -1, Attacks: slices.Concat(attack.Files, attack.Snapshot, attack.Held, attack.Processes, attack.Sockets,
		ownAttacks, configAttacks, deviceAttacks, blockAttacks, blockNeeds, needs, restoredNeeds, templateNeeds, deviceNeeds)}
	for name, flag := range map[string]int{rootLink: unix.O_RDONLY, scratchLink: unix.O_RDWR} {
		if _, err := unix.Open(name, flag|unix.O_CLOEXEC, 0); err != nil {
			return fmt.Errorf("open %s: %w", name, err)
		}
	}
	restored := slices.Contains(os.Args, "--restore")
	flag, mapping, started := unix.O_RDWR, unix.MAP_SHARED, eventBooted
	if restored {
		flag, mapping, started = unix.O_RDONLY, unix.MAP_PRIVATE, eventResumed
	}
	fd, err := unix.Open(filepath.Join(templateLink, memoryName), flag|unix.O_CLOEXEC, 0)
	if err == nil {
		v.Memory = fd
		_, err = unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, mapping)
	}
	if err != nil && (restored || !errors.Is(err, unix.ENOENT)) {
		return fmt.Errorf("map the guest's memory: %w", err)
	}
	for _, name := range []string{consoleSocket, guestSocket} {
		l, err := net.Listen("unix", name)
		if err != nil {
			return err
		}
		go acceptAll(l)
	}
	f := &fake{state: stateRunning, cpus: 1, devices: map[string]bool{}, used: map[string]bool{}, events: os.NewFile(fdEvents, "events")}
	f.tell(sourceVM, started, nil)
	return serveBoth(&v, f)
}

func acceptAll(l net.Listener) {
	for {
		if _, err := l.Accept(); err != nil {
			return
		}
	}
}

// serveBoth serves the API and orders on its socket.
func serveBoth(v *attack.VMM, f *fake) error {
	api, err := net.FileListener(os.NewFile(fdAPI, "api"))
	if err != nil {
		return err
	}
	for {
		c, err := api.Accept()
		if err != nil {
			return err
		}
		r := bufio.NewReader(c)
		if first, _ := r.Peek(1); len(first) == 0 || first[0] != '{' {
			f.serve(peeked{c, r})
			continue
		}
		if err := v.Answer(r, c); err != nil {
			return err
		}
		_ = c.Close()
	}
}

// peeked is a connection of which something has been read ahead.
type peeked struct {
	net.Conn
	ahead io.Reader
}

func (p peeked) Read(b []byte) (int, error) { return p.ahead.Read(b) }
