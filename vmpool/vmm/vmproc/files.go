// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmproc

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// WithFDs calls f with the files' descriptors, which stay open meanwhile and
// keep their mode: os.File.Fd would make them blocking, for the caller too.
func WithFDs(files []*os.File, f func([]int) error) error { return withFDs(files, nil, f) }

func withFDs(files []*os.File, fds []int, f func([]int) error) error {
	if len(files) == 0 {
		return f(fds)
	}
	raw, err := files[0].SyscallConn()
	if err != nil {
		return err
	}
	var called error
	err = raw.Control(func(fd uintptr) { called = withFDs(files[1:], append(fds, int(fd)), f) })
	return errors.Join(err, called)
}

// SendFiles writes data, with the files passed along, and tells how much it has written.
func SendFiles(conn *net.UnixConn, data []byte, files []*os.File) (written int, _ error) {
	err := WithFDs(files, func(fds []int) (err error) {
		var rights []byte
		if len(fds) > 0 {
			rights = unix.UnixRights(fds...)
		}
		written, _, err = conn.WriteMsgUnix(data, rights, nil)
		return err
	})
	if err != nil || written == len(data) {
		return written, err
	}
	n, err := conn.Write(data[written:])
	return written + n, err
}

// Listen makes a unix socket at path, in the place of one that an earlier VM left, for
// a VMM to inherit: nobody then waits for it to appear. The caller closes the file.
func Listen(path string) (*os.File, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	_ = l.Close()
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// CloseAll closes files that nothing is written to.
func CloseAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}
