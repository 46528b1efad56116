// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"errors"
	"fmt"
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage/pattern"
)

// echo answers datagrams of both families on a port.
func echo(args []string) (int, error) {
	if len(args) != 1 {
		return 64, errors.New("want a port")
	}
	ended := make(chan error)
	for _, network := range []string{"udp4", "udp6"} {
		conn, err := pattern.ListenEcho(network, ":"+args[0])
		if err != nil {
			return 1, err
		}
		go func() { ended <- pattern.Echo(conn) }()
	}
	fmt.Println("listening")
	return 1, <-ended
}

// probe tells whether unfragmented packets of such sizes go to an echo and back.
func probe(args []string) (int, error) {
	if len(args) < 2 {
		return 64, errors.New("want an address and sizes")
	}
	for _, a := range args[1:] {
		size, err := strconv.Atoi(a)
		if err != nil {
			return 64, err
		}
		switch err := pattern.Probe(args[0], size, 10*time.Second); {
		case err == nil:
			fmt.Println(size, "passes")
		case errors.Is(err, pattern.ErrTooLarge):
			fmt.Println(size, "is too large")
		default:
			return 1, err
		}
	}
	return 0, nil
}

// offloads are what a network device may do for the kernel, by ethtool's numbers.
var offloads = []struct {
	name string
	cmd  uint32
}{
	{"rx-checksum", unix.ETHTOOL_GRXCSUM}, {"tx-checksum", unix.ETHTOOL_GTXCSUM}, {"scatter-gather", unix.ETHTOOL_GSG},
	{"tcp-segmentation", unix.ETHTOOL_GTSO}, {"generic-segmentation", unix.ETHTOOL_GGSO}, {"generic-receive", unix.ETHTOOL_GGRO},
}

// showOffloads prints which offloads a network device has on.
func showOffloads(args []string) (int, error) {
	if len(args) != 1 || len(args[0]) >= unix.IFNAMSIZ {
		return 64, errors.New("want the name of a network device")
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 1, err
	}
	defer unix.Close(fd)
	for _, o := range offloads {
		value := struct{ cmd, data uint32 }{cmd: o.cmd}
		// struct ifreq: a name, and a pointer in what is left of its 40 bytes.
		var req struct {
			name [unix.IFNAMSIZ]byte
			data unsafe.Pointer
			_    [16]byte
		}
		copy(req.name[:], args[0])
		req.data = unsafe.Pointer(&value)
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 {
			return 1, fmt.Errorf("%s: %w", o.name, errno)
		}
		state := "off"
		if value.data != 0 {
			state = "on"
		}
		fmt.Println(o.name, state)
	}
	return 0, nil
}
