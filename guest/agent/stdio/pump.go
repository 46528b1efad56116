// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package stdio

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	runc "github.com/containerd/go-runc"
	"golang.org/x/sys/unix"
)

// bufferSize is the most that is under way of one stream: a pipe's capacity.
const bufferSize = 64 << 10

var buffers = sync.Pool{New: func() any {
	b := make([]byte, bufferSize)
	return &b
}}

// readerOnly and writerOnly hide methods that io.Copy would rather use, with
// buffers of their own.
type (
	readerOnly struct{ io.Reader }
	writerOnly struct{ io.Writer }
)

// pump copies from a pipe or terminal until its end, and returns nil then; an
// error is the writer's. A buffer is held only while there is something in it,
// so that a thousand silent processes cost none.
func pump(w io.Writer, from *os.File) error {
	for {
		buf, n, err := read(from)
		if n > 0 {
			_, werr := w.Write((*buf)[:n])
			buffers.Put(buf)
			if werr != nil {
				return fmt.Errorf("write to stream: %w", werr)
			}
		}
		if err != nil {
			return nil
		}
	}
}

// read waits for data, and gives it in a buffer that is the caller's if n > 0.
// Every error means the end: EOF, EIO of a hung-up terminal, a closed file.
func read(from *os.File) (*[]byte, int, error) {
	c, err := from.SyscallConn()
	if err != nil {
		return nil, 0, err
	}
	var (
		buf  *[]byte
		n    int
		rerr error
	)
	try := func(fd uintptr) bool {
		buf, n, rerr = readNow(int(fd))
		return !errors.Is(rerr, unix.EAGAIN)
	}
	err = c.Read(try)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		// A terminal whose process has ended: take what is there, without waiting.
		if cerr := c.Control(func(fd uintptr) { try(fd) }); cerr != nil {
			return nil, 0, cerr
		}
		err = nil
	}
	return buf, n, errors.Join(err, rerr)
}

// readNow reads once, from a file that does not block.
func readNow(fd int) (*[]byte, int, error) {
	buf := buffers.Get().(*[]byte)
	for {
		n, err := unix.Read(fd, *buf)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err == nil && n == 0:
			err = io.EOF
		case err == nil:
			return buf, n, nil
		}
		buffers.Put(buf)
		return nil, 0, err
	}
}

// ReceiveMaster takes the terminal's master that crun sent, as a file whose
// reads end when it is closed.
func ReceiveMaster(s *runc.Socket) (*os.File, error) {
	c, err := s.ReceiveMaster()
	if err != nil {
		return nil, fmt.Errorf("receive terminal: %w", err)
	}
	defer c.Close()
	fd, err := unix.FcntlInt(c.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate terminal: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("make terminal non-blocking: %w", err)
	}
	return os.NewFile(uintptr(fd), "pty"), nil
}
