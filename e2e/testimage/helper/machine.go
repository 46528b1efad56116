// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// machine is the first process of a VM that has nothing but a kernel, a disk and a network
// device: what a VM does without us. It gets the device's address, serves and echoes as
// serve and echo do on the two ports, and on the third one answers each connection's line,
// which is the arguments of readbench or filebench, with what that prints.
func machine(args []string) (int, error) {
	if os.Getpid() != 1 {
		return 64, errors.New("this is a machine's first process")
	}
	if len(args) != 4 {
		return 64, errors.New("want an address with its prefix's length, and three ports")
	}
	addr, err := netip.ParsePrefix(args[0])
	if err != nil {
		return 64, err
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return 1, fmt.Errorf("mount /proc: %w", err)
	}
	for _, dev := range []string{"lo", "eth0"} {
		own := addr
		if dev == "lo" {
			own = netip.MustParsePrefix("127.0.0.1/8")
		}
		if err := configure(dev, own); err != nil {
			return 1, fmt.Errorf("%s: %w", dev, err)
		}
	}
	l, err := net.Listen("tcp4", ":"+args[3])
	if err != nil {
		return 1, err
	}
	ended := make(chan error)
	background := func(run func([]string) (int, error), port string) {
		go func() {
			_, err := run([]string{port})
			ended <- err
		}()
	}
	background(serve, args[1])
	background(echo, args[2])
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				ended <- err
				return
			}
			if err := answerBench(c); err != nil {
				fmt.Fprintln(c, "failed:", err)
			}
			_ = c.Close()
		}
	}()
	return 1, <-ended
}

func answerBench(c net.Conn) error {
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return err
	}
	args := strings.Fields(line)
	if len(args) == 1 {
		return measureRead(c, args[0])
	}
	if len(args) != 3 {
		return fmt.Errorf("not understood: %q", line)
	}
	mib, err1 := strconv.Atoi(args[1])
	many, err2 := strconv.Atoi(args[2])
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	return measureFiles(c, args[0], mib, many)
}

// configure gives a network device its address and turns it on.
func configure(dev string, addr netip.Prefix) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq(dev)
	if err != nil {
		return err
	}
	ip := addr.Addr().As4()
	mask := net.CIDRMask(addr.Bits(), 32)
	for _, step := range []struct {
		req uint
		set func() error
	}{
		{unix.SIOCSIFADDR, func() error { return ifr.SetInet4Addr(ip[:]) }},
		{unix.SIOCSIFNETMASK, func() error { return ifr.SetInet4Addr(mask) }},
		{unix.SIOCSIFFLAGS, func() error { ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING); return nil }},
	} {
		if err := step.set(); err != nil {
			return err
		}
		if err := unix.IoctlIfreq(fd, step.req, ifr); err != nil {
			return err
		}
	}
	return nil
}
