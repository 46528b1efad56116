// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package relay joins two connections to one: what arrives at either is sent on by the
// other. Host and agent both use it for forwarded ports.
//
// Each direction has its own end, and is as slow as its reader: what is under way is
// one buffer, and what the connections hold themselves. A connection that is reset, or
// that fails, resets the other. One whose peer has closed it altogether cannot be told
// from one whose peer still reads, until the peer's kernel forgets it, some minute
// later; then the other is reset too, so that no connection stays for ever because
// somebody does not end his half.
package relay

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// Conn is a connection whose directions end separately.
type Conn interface {
	net.Conn
	// CloseWrite ends the direction to the peer.
	CloseWrite() error
}

// errGone is why a relay ends whose peer has gone after it ended its direction.
var errGone = errors.New("the connection is gone that had ended one direction")

// bufferBytes is a direction's buffer: a frame of the guest's transport.
const bufferBytes = 16 << 10

var buffers = sync.Pool{New: func() any {
	b := make([]byte, bufferBytes)
	return &b
}}

// Run joins a and b until both directions have ended, and closes them. An error is
// why the connections were reset. What closes or resets one of them ends it.
func Run(a, b Conn) error {
	r := &run{a: a, b: b}
	var wg sync.WaitGroup
	wg.Go(func() { r.carry(a, b) })
	r.carry(b, a)
	wg.Wait()
	return r.err
}

type run struct {
	a, b  Conn
	ended atomic.Int32 // directions
	once  sync.Once
	err   error
}

// carry is one direction.
func (r *run) carry(to, from Conn) {
	if err := pass(to, from); err != nil {
		r.reset(err)
		return
	}
	// If it fails, the other direction knows more.
	_ = to.CloseWrite()
	if r.ended.Add(1) == 2 {
		r.once.Do(func() { r.err = errors.Join(ignoreClosed(r.a.Close()), ignoreClosed(r.b.Close())) })
		return
	}
	if gone(from) {
		r.reset(errGone)
	}
}

func (r *run) reset(why error) {
	r.once.Do(func() {
		r.err = why
		Reset(r.a)
		Reset(r.b)
	})
}

// ignoreClosed takes a connection that somebody else has closed for closed.
func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// pass copies to the end of from. Readers and writers are hidden from io.Copy, which
// would use buffers of its own.
func pass(to io.Writer, from io.Reader) error {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	_, err := io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, *buf)
	if err != nil {
		return fmt.Errorf("relay: %w", err)
	}
	return nil
}

// Reset closes a connection so that its peer is told of a reset, if it can be.
func Reset(c net.Conn) {
	switch c := c.(type) {
	case interface{ Reset() error }:
		_ = c.Reset()
		return
	case interface{ SetLinger(sec int) error }:
		_ = c.SetLinger(0)
	}
	_ = c.Close()
}

// gone waits until a connection whose peer has ended its direction is no more, and
// returns true if that was not by Close here.
func gone(c Conn) bool {
	switch c := c.(type) {
	case interface{ Gone() bool }:
		return c.Gone()
	case syscall.Conn:
		return socketGone(c)
	}
	return false
}

// socketGone waits as a read does, which every change of the socket wakes. The
// keep-alive, which Go turns on, finds out that the peer is gone.
func socketGone(c syscall.Conn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	dead := false
	err = raw.Read(func(fd uintptr) bool {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		dead = err == nil && info.State == tcpClose
		// Of another kind of socket nothing can be learnt.
		return err != nil || dead
	})
	return err == nil && dead
}

// tcpClose is the kernel's TCP_CLOSE.
const tcpClose = 7
