// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package transport

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/hashicorp/yamux"
)

// errLost is what connections fail with after the session has ended. It is
// io.ErrClosedPipe too, which ttrpc turns into its ErrClosed.
var errLost = fmt.Errorf("connection to the peer lost: %w", errors.Join(errdefs.ErrUnavailable, io.ErrClosedPipe))

// closeWait bounds how long Close waits until the peer has been told.
const closeWait = time.Second

// Addr is a port of the guest.
type Addr uint32

// Network is "guest".
func (Addr) Network() string { return "guest" }

// String is the port in decimal.
func (a Addr) String() string { return strconv.FormatUint(uint64(a), 10) }

// Conn is a connection between host and guest, a net.Conn with CloseWrite. See
// the package's documentation for what it does at its end.
type Conn struct {
	stream *yamux.Stream
	link   *link
	port   uint32

	fin   atomic.Bool // the peer ended its direction
	reset atomic.Bool // a reset is sent, or about to be
	told  atomic.Bool // a reset was sent

	resetAt time.Time // when reset was set; under the link's mu

	rmu sync.Mutex // held by a Read
	eof bool       // Read has returned the peer's end; under rmu

	wmu       sync.Mutex // held by a timed Write
	stuck     bool       // a timed Write was given up half-way; under wmu
	wdeadline atomic.Pointer[time.Time]
	wtimeout  atomic.Int64

	mu      sync.Mutex
	closed  bool
	finSent bool

	// over is closed, once, by Close and by the peer's reset.
	over   chan struct{}
	finish sync.Once
}

var _ net.Conn = (*Conn)(nil)

func newConn(s *yamux.Stream, l *link, port uint32) *Conn {
	c := &Conn{stream: s, link: l, port: port, over: make(chan struct{})}
	l.add(c)
	return c
}

// Read returns what arrived; io.EOF means that the peer ended its direction.
func (c *Conn) Read(p []byte) (int, error) {
	c.rmu.Lock()
	defer c.rmu.Unlock()
	if c.isClosed() {
		return 0, net.ErrClosed
	}
	n, err := c.stream.Read(p)
	switch {
	case err == nil:
		return n, nil
	case errors.Is(err, io.EOF):
		if c.fin.Load() {
			c.eof = true
			return n, io.EOF
		}
		err = errLost
	case c.isClosed():
		err = net.ErrClosed
	default:
		err = c.convert("read", err)
	}
	return n, err
}

// Write returns when all of p is on its way, which is when the peer has room for
// it. It ends early when the connection or the session ends, and at the deadline.
func (c *Conn) Write(p []byte) (int, error) {
	if d, ok := c.deadline(); ok {
		return c.writeTimed(p, d)
	}
	return c.write(p)
}

func (c *Conn) write(p []byte) (int, error) {
	var total int
	for {
		chunk := p[total:min(len(p), total+maxBody)]
		n, err := c.stream.Write(chunk)
		total += n
		if err != nil {
			return total, c.convert("write", err)
		}
		if total == len(p) {
			return total, nil
		}
	}
}

// deadline is by when a Write that begins now must end.
func (c *Conn) deadline() (time.Time, bool) {
	var d time.Time
	if t := c.wdeadline.Load(); t != nil {
		d = *t
	}
	if limit := c.wtimeout.Load(); limit > 0 {
		if t := time.Now().Add(time.Duration(limit)); d.IsZero() || t.Before(d) {
			d = t
		}
	}
	return d, !d.IsZero()
}

// writeTimed writes from another goroutine, as yamux's own deadline does not
// cover a link that takes no more. After a timeout the connection takes no
// more writes, because how much of p will arrive is open.
func (c *Conn) writeTimed(p []byte, deadline time.Time) (int, error) {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	timeout := fmt.Errorf("write to guest port %d: %w", c.port, os.ErrDeadlineExceeded)
	if c.stuck || !time.Now().Before(deadline) {
		return 0, timeout
	}
	type result struct {
		n   int
		err error
	}
	done := make(chan result, 1)
	body := append([]byte(nil), p...)
	go func() {
		n, err := c.write(body)
		done <- result{n, err}
	}()
	timer := time.NewTimer(time.Until(deadline))
	defer timer.Stop()
	select {
	case r := <-done:
		return r.n, r.err
	case <-timer.C:
		c.stuck = true
		return 0, timeout
	}
}

func (c *Conn) convert(op string, err error) error {
	switch {
	case errors.Is(err, yamux.ErrSessionShutdown):
		return errLost
	case c.isClosed(), errors.Is(err, yamux.ErrStreamClosed):
		if c.stream.Session().IsClosed() && !c.isClosed() {
			return errLost
		}
		return net.ErrClosed
	case errors.Is(err, yamux.ErrConnectionReset):
		err = syscall.ECONNRESET
	case errors.Is(err, yamux.ErrTimeout):
		err = os.ErrDeadlineExceeded
	default: // the link's own error, before yamux has ended the session
		err = fmt.Errorf("%w: %w", errLost, err)
	}
	return fmt.Errorf("%s guest port %d: %w", op, c.port, err)
}

// CloseWrite ends this side's direction. What was written before arrives.
func (c *Conn) CloseWrite() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return net.ErrClosed
	}
	if c.finSent {
		c.mu.Unlock()
		return nil
	}
	c.finSent = true
	c.mu.Unlock()
	return c.stream.Close()
}

// Close ends both directions and ends blocked calls. What was written before
// arrives, unless the peer goes on writing.
func (c *Conn) Close() error { return c.end(false) }

// Reset is Close, and the peer's calls fail with ECONNRESET, also those that wait for
// data. What was written before may be lost.
func (c *Conn) Reset() error { return c.end(true) }

func (c *Conn) end(reset bool) error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	c.mu.Unlock()
	c.setOver()

	// yamux's Close does not end a blocked Read, a deadline does.
	_ = c.stream.SetReadDeadline(time.Unix(1, 0))
	told := make(chan struct{})
	go func() {
		if reset {
			// Before the end of this direction, which would be taken for no more than that.
			c.link.sendReset(c)
		}
		c.linger(told)
	}()
	timer := time.NewTimer(closeWait)
	defer timer.Stop()
	select {
	case <-told:
	case <-timer.C:
	}
	return nil
}

// Gone waits for the end of the connection, also after Read has returned the peer's
// end of its direction: a reset by the peer or the loss of the session, for which it
// returns true, or Close.
func (c *Conn) Gone() bool {
	select {
	case <-c.over:
	case <-c.stream.Session().CloseChan():
	}
	return !c.isClosed()
}

// setOver notes that the connection is over.
func (c *Conn) setOver() { c.finish.Do(func() { close(c.over) }) }

func (c *Conn) isClosed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

// LocalAddr is the guest's port.
func (c *Conn) LocalAddr() net.Addr { return Addr(c.port) }

// RemoteAddr is the guest's port.
func (c *Conn) RemoteAddr() net.Addr { return Addr(c.port) }

// SetDeadline sets both deadlines.
func (c *Conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline also ends a Read that is under way.
func (c *Conn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	return c.stream.SetReadDeadline(t)
}

// SetWriteDeadline holds for Writes that begin after it.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	if c.isClosed() {
		return net.ErrClosed
	}
	c.wdeadline.Store(&t)
	return nil
}

// SetWriteTimeout limits how long each later Write may take; 0 is no limit. It
// serves protocols that set no deadlines, such as ttrpc, against a peer that has
// stopped reading. After a timeout the connection takes no more writes.
func (c *Conn) SetWriteTimeout(d time.Duration) { c.wtimeout.Store(int64(d)) }
