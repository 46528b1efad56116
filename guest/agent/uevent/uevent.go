// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package uevent waits for devices by the kernel's own announcements, so that
// nothing is polled. A socket exists only while somebody waits: the agent is
// otherwise idle, and a snapshot holds no queue of stale events.
package uevent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// maxEvent bounds one announcement: UEVENT_BUFFER_SIZE and its header.
const maxEvent = 8 << 10

// Event is one announcement of the kernel.
type Event struct {
	// Action is "add", "remove", "change", "online", "offline", …
	Action string
	// DevPath is the device's path below /sys.
	DevPath string
	// Subsystem is "block", "net", "cpu", "memory", …
	Subsystem string
}

// parse decodes a kernel's message: "action@devpath", then NUL-separated KEY=VALUE.
func parse(msg []byte) (Event, bool) {
	var e Event
	head, rest, _ := bytes.Cut(msg, []byte{0})
	action, path, ok := strings.Cut(string(head), "@")
	if !ok || action == "" || !strings.HasPrefix(path, "/") {
		return e, false
	}
	e.Action, e.DevPath = action, path
	for len(rest) > 0 {
		var kv []byte
		kv, rest, _ = bytes.Cut(rest, []byte{0})
		if v, ok := bytes.CutPrefix(kv, []byte("SUBSYSTEM=")); ok {
			e.Subsystem = string(v)
		}
	}
	return e, true
}

// Await calls check until it says true or fails: at once, after each event of
// one of the subsystems, and every again (0: never), as some changes are not
// announced. It ends with ctx's error when ctx ends.
func Await(ctx context.Context, again time.Duration, check func() (bool, error), subsystems ...string) error {
	// The cheap case first: what is waited for is often there.
	if done, err := check(); done || err != nil {
		return err
	}
	l, err := listen()
	if err != nil {
		return err
	}
	defer l.Close()
	stop := context.AfterFunc(ctx, func() { _ = l.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	buf := make([]byte, maxEvent)
	for {
		// After the socket is open nothing is missed: check, then read.
		if done, err := check(); done || err != nil {
			return err
		}
		if err := next(ctx, l, buf, again, subsystems); err != nil {
			return err
		}
	}
}

// next returns when an event of the subsystems came, or again has passed.
func next(ctx context.Context, l *os.File, buf []byte, again time.Duration, subsystems []string) error {
	if again > 0 {
		_ = l.SetReadDeadline(time.Now().Add(again))
	}
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := l.Read(buf)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return ctx.Err()
		case errors.Is(err, unix.ENOBUFS):
			return nil // Events were lost: one may have been ours.
		case err != nil:
			return fmt.Errorf("read device events: %w", err)
		}
		e, ok := parse(buf[:n])
		if !ok {
			continue
		}
		if slices.Contains(subsystems, e.Subsystem) {
			return nil
		}
	}
}

// listen opens a socket that hears the kernel only: multicast group 1 needs
// privilege to send to, and group 2, udev's, is not joined.
func listen() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("open device event socket: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("bind device event socket: %w", err)
	}
	return os.NewFile(uintptr(fd), "uevent"), nil
}
