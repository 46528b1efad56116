// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Command hostile is PID 1 of a guest that means harm, for tests of the host. Without a
// kernel parameter "hostile" it becomes the real agent, which lies beside it. With one it
// speaks the agent's API itself, runs no containers, and once one has been started it
// misbehaves as the parameter says.
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/api"
	"github.com/cloudhv/containerd-cloudhv/guest/api/transport"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// realAgent is where the image has it.
const realAgent = "/agent"

func main() {
	err := run()
	fmt.Println("hostile:", err)
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func run() error {
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mount proc: %w", err)
	}
	text, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	mode := ""
	for p := range strings.FieldsSeq(string(text)) {
		if v, ok := strings.CutPrefix(p, "hostile="); ok {
			mode = v
		}
	}
	if mode == "" {
		if err := unix.Unmount("/proc", 0); err != nil {
			return fmt.Errorf("unmount proc: %w", err)
		}
		return unix.Exec(realAgent, []string{"/init"}, nil)
	}
	for _, m := range [][2]string{{"sysfs", "/sys"}, {"devtmpfs", "/dev"}} {
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil && err != unix.EBUSY { //nolint:errorlint // a system call's own
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	return serve(mode)
}

// serve speaks to the host until the VM is turned off.
func serve(mode string) error {
	ctx := context.Background()
	mux := transport.NewMux()
	g := newGuest(mode)
	rpc, err := mux.Listen(api.PortRPC)
	if err != nil {
		return err
	}
	streams, err := mux.Listen(api.PortStream)
	if err != nil {
		return err
	}
	forwards, err := mux.Listen(api.PortForward)
	if err != nil {
		return err
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		return err
	}
	guestv1.RegisterMachineService(server, g)
	guestv1.RegisterTaskService(server, g)
	go accept(streams, g.stream)
	go accept(forwards, g.forward)
	go g.port(ctx, mux, transport.PortVM, transport.VsockVM, "vm")
	go g.port(ctx, mux, transport.PortPod, transport.VsockPod, "pod")
	return server.Serve(ctx, listener{rpc, g})
}

func accept(l net.Listener, f func(net.Conn)) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go f(conn)
	}
}
