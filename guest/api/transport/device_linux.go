// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package transport

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Names of the virtio-serial ports that a VM has.
const (
	// PortVM is the plugin's.
	PortVM = "io.cloudhv.vm"
	// PortPod is the pod's shim's.
	PortPod = "io.cloudhv.pod"
)

const (
	portClass = "/sys/class/virtio-ports"
	// reopenPause keeps attempts to open a failing device apart.
	reopenPause = 100 * time.Millisecond
)

// ServeDevice serves the virtio-serial port of the given name, session after
// session, until ctx ends, and returns ctx's error. It waits for the device to
// appear, and needs /sys and /dev. While there is no host it costs nothing.
func (m *Mux) ServeDevice(ctx context.Context, name string) error {
	for {
		path, err := findPort(ctx, name)
		if err == nil {
			err = m.servePort(ctx, path)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		// The device failed or went away. It may come back.
		timer := time.NewTimer(reopenPause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return errors.Join(ctx.Err(), err)
		}
	}
}

func (m *Mux) servePort(ctx context.Context, path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // nothing is buffered
	return m.serve(ctx, f, func() error { return awaitInput(f) })
}

// awaitInput returns when there is something to read. A port without a host
// is always readable and gives zero bytes, so a plain read would return, and a
// level-triggered poll too; Go's poller is edge-triggered and wakes up when
// the port's state changes.
func awaitInput(f *os.File) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = rc.Read(func(fd uintptr) bool {
		var p = []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		_, failed = unix.Poll(p, 0)
		if errors.Is(failed, unix.EINTR) {
			failed = nil
		}
		const readable = unix.POLLIN
		return failed != nil || p[0].Revents&unix.POLLERR != 0 || p[0].Revents&(readable|unix.POLLHUP) == readable
	})
	return errors.Join(err, failed)
}

// findPort returns the device of a virtio-serial port, and waits for it.
func findPort(ctx context.Context, name string) (string, error) {
	if path, err := lookupPort(name); !errors.Is(err, fs.ErrNotExist) {
		return path, err
	}
	events, err := uevents()
	if err != nil {
		return "", err
	}
	defer events.Close() //nolint:errcheck // nothing is buffered
	defer context.AfterFunc(ctx, func() { _ = events.Close() })()
	buf := make([]byte, 16<<10)
	for {
		// The name comes after the device, with an event of its own.
		path, err := lookupPort(name)
		if !errors.Is(err, fs.ErrNotExist) {
			return path, err
		}
		for {
			n, err := events.Read(buf)
			if errors.Is(err, unix.ENOBUFS) {
				break
			}
			if err != nil {
				return "", fmt.Errorf("wait for port %s: %w", name, err)
			}
			if bytes.Contains(buf[:n], []byte("SUBSYSTEM=virtio-ports")) {
				break
			}
		}
	}
}

// lookupPort returns the device of a virtio-serial port, or fs.ErrNotExist.
func lookupPort(name string) (string, error) {
	ports, err := filepath.Glob(portClass + "/*/name")
	if err != nil {
		return "", err
	}
	for _, p := range ports {
		got, err := os.ReadFile(p)
		if err == nil && string(bytes.TrimSpace(got)) == name {
			return "/dev/" + filepath.Base(filepath.Dir(p)), nil
		}
	}
	return "", fmt.Errorf("virtio-serial port %s: %w", name, fs.ErrNotExist)
}

// uevents opens the kernel's messages about devices.
func uevents() (io.ReadCloser, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("open uevent socket: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("bind uevent socket: %w", err)
	}
	return os.NewFile(uintptr(fd), "uevent"), nil
}
