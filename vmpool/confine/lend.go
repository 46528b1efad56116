// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package confine

import (
	"bytes"
	"errors"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// lender answers a program that opens files for reading and writing: with a file of
// ours for a path that it knows, and for all others, and for names that it gives its
// sockets, that the kernel shall go on. What
// the program may open then the kernel decides by who it is, as ever; the lender adds
// to that only the files that it lends, in the mode in which they are open here.
type lender struct {
	file   *os.File
	files  map[string]*os.File
	closed sync.Once
	over   chan struct{}
}

// Structures of the kernel's include/uapi/linux/seccomp.h.
type (
	notification struct {
		id     uint64
		pid    uint32
		_      uint32 // flags
		number int32
		_      uint32 // architecture
		_      uint64 // instruction pointer
		args   [6]uint64
	}
	reply struct {
		id    uint64
		_     int64 // the call's result
		_     int32 // its error
		flags uint32
	}
	newFile struct {
		id          uint64
		flags, from uint32
		_           uint32 // the number that it is to have
		mode        uint32
	}
)

// ioctlAddFD is SECCOMP_IOCTL_NOTIF_ADDFD.
const ioctlAddFD = 0x40182103

// newLender serves the listener of a seccomp filter, which it owns, until close or the
// end of all that the filter is for.
func newLender(listener int, files map[string]*os.File) *lender {
	_ = unix.SetNonblock(listener, true)
	l := &lender{file: os.NewFile(uintptr(listener), "seccomp"), files: files, over: make(chan struct{})}
	go func() {
		defer close(l.over)
		l.serve()
	}()
	return l
}

func (l *lender) close() {
	l.closed.Do(func() { _ = l.file.Close() })
	<-l.over
}

func (l *lender) serve() {
	raw, err := l.file.SyscallConn()
	if err != nil {
		return
	}
	for {
		ended := false
		err := raw.Read(func(fd uintptr) bool {
			fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			n, err := unix.Poll(fds, 0)
			if err != nil || n == 0 {
				return false
			}
			if fds[0].Revents&unix.POLLIN == 0 {
				ended = true // the program, and all that it has started
				return true
			}
			l.answer(fd)
			return true
		})
		if err != nil || ended {
			return
		}
	}
}

// answer answers one question. One whose asker has gone meanwhile needs none.
func (l *lender) answer(fd uintptr) {
	var ask notification
	if ioctl(fd, unix.SECCOMP_IOCTL_NOTIF_RECV, pointer(&ask)) != nil {
		return
	}
	if f := l.wanted(&ask); f != nil && l.give(fd, ask.id, f) == nil {
		return
	}
	goOn := reply{id: ask.id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}
	_ = ioctl(fd, unix.SECCOMP_IOCTL_NOTIF_SEND, pointer(&goOn))
}

// wanted is the file that is asked for, if that is lent.
func (l *lender) wanted(ask *notification) *os.File {
	switch ask.number {
	case unix.SYS_BIND:
		return nil
	case unix.SYS_OPENAT:
		return l.files[readPath(int(ask.pid), uintptr(ask.args[1]))]
	default:
		return l.files[readPath(int(ask.pid), uintptr(ask.args[0]))]
	}
}

// give makes f a file of the asker's, and the answer to it.
func (l *lender) give(fd uintptr, id uint64, f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var addErr error
	err = raw.Control(func(from uintptr) {
		add := newFile{id: id, flags: unix.SECCOMP_ADDFD_FLAG_SEND, from: uint32(from), mode: unix.O_CLOEXEC}
		addErr = ioctl(fd, ioctlAddFD, pointer(&add))
	})
	return errors.Join(err, addErr)
}

// readPath reads a path from a process's memory, page by page as the next one need
// not be there; "" if there is none.
func readPath(pid int, at uintptr) string {
	var path []byte
	for len(path) < unix.PathMax {
		buf := make([]byte, 4096-at%4096)
		local := unix.Iovec{Base: &buf[0]}
		local.SetLen(len(buf))
		n, err := unix.ProcessVMReadv(pid, []unix.Iovec{local}, []unix.RemoteIovec{{Base: at, Len: len(buf)}}, 0)
		if err != nil || n == 0 {
			return ""
		}
		if end := bytes.IndexByte(buf[:n], 0); end >= 0 {
			return string(append(path, buf[:end]...))
		}
		path = append(path, buf[:n]...)
		at += uintptr(n)
	}
	return ""
}
