// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package qemu

import (
	"fmt"
	"net"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/vmpool/confine/attack"
)

// This file is what runs in QEMU's place when a guest has taken it over: the test's
// own program, started by the driver with QEMU's command line. It tries what it is
// asked for on its monitor's socket.

// ownAttacks are those on what QEMU alone is kept from: it opens no file by a path.
var ownAttacks = []attack.Attack{
	{Name: "read the snapshot by its path", Do: attack.Open(func(t *attack.Targets) string { return t.Memory }, unix.O_RDONLY)},
	{Name: "open its disk by its path", Do: attack.Open(func(t *attack.Targets) string { return t.Disk }, unix.O_WRONLY)},
	{Name: "make a socket", Do: func(*attack.Targets) error {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		if err == nil {
			err = unix.Close(fd)
		}
		return err
	}},
}

var attacks = slices.Concat(attack.Files, attack.Snapshot, attack.Held, attack.Processes, attack.Sockets, ownAttacks)

// attacker takes QEMU's place, if this process is to.
func attacker() {
	attack.Main()
	if !slices.Contains(os.Args, "-nodefaults") {
		return
	}
	if err := serveAttacks(); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(1)
}

func serveAttacks() error {
	v := attack.VMM{Memory: -1, Attacks: attacks}
	for _, arg := range os.Args {
		if _, path, ok := strings.Cut(arg, "mem-path="); ok {
			fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err != nil {
				return fmt.Errorf("QEMU would not start: %w", err)
			}
			v.Memory = fd
			if _, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE); err != nil {
				return fmt.Errorf("QEMU would not start: %w", err)
			}
		}
	}
	l, err := net.FileListener(os.NewFile(fdMonitor, monitorSocket))
	if err != nil {
		return err
	}
	return v.Serve(l)
}
