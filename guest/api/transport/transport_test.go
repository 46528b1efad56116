// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package transport

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestEcho(t *testing.T) {
	t.Parallel()
	p := newFakePort(t, false)
	m := serveFake(t, p)
	handle(t, m, 7, echo)
	c := open(t, p)
	for i := range 3 {
		conn := dial(t, c, 7)
		want := bytes.Repeat([]byte{byte(i)}, 100_000)
		go func() {
			_, _ = conn.Write(want)
			_ = conn.CloseWrite()
		}()
		got, err := io.ReadAll(conn)
		require.NoError(t, err)
		assert.True(t, bytes.Equal(want, got))
		assert.NoError(t, conn.Close())
	}
}

func TestOpenRefusesEndpoints(t *testing.T) {
	t.Parallel()
	for _, e := range []string{"", "/run/x", "unix:///run/x", "serial+unix://run/x", "vsock+unix:///run/x"} {
		_, err := Open(e)
		assert.ErrorIs(t, err, errdefs.ErrInvalidArgument, "%q", e)
	}
}

func TestDialErrors(t *testing.T) {
	t.Parallel()
	p := newFakePort(t, false)
	m := serveFake(t, p)
	handle(t, m, 7, echo)
	c := open(t, p)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()

	_, err := c.Dial(ctx, 8)
	require.ErrorIs(t, err, errdefs.ErrNotFound)

	conn := dial(t, c, 7)
	require.NoError(t, c.Close())
	_, err = c.Dial(ctx, 7)
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	_, err = conn.Read(make([]byte, 1))
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	_, err = conn.Write([]byte("x"))
	require.ErrorIs(t, err, errdefs.ErrUnavailable)

	gone, err := Open("serial+unix:///nonexistent/pod.sock")
	require.NoError(t, err)
	_, err = gone.Dial(ctx, 7)
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	<-gone.Done()
	require.NoError(t, gone.Close())
}

// TestNoGuest has a port that nobody opens in the guest: Dial waits for as long
// as its context says, and works as soon as the guest is there.
func TestNoGuest(t *testing.T) {
	t.Parallel()
	p := newFakePort(t, false)
	c := open(t, p)
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	_, err := c.Dial(ctx, 7)
	require.ErrorIs(t, err, context.DeadlineExceeded)

	// Two attempts have been given up by then.
	time.Sleep(3200 * time.Millisecond)
	m := serveFake(t, p)
	handle(t, m, 7, echo)
	began := time.Now()
	dial(t, c, 7)
	assert.Less(t, time.Since(began), 10*time.Second)
}

// TestSecondClientWaits has two clients of one port: the second is served as
// soon as the first has gone.
func TestSecondClientWaits(t *testing.T) {
	t.Parallel()
	p := newFakePort(t, false)
	m := serveFake(t, p)
	handle(t, m, 7, echo)
	first, second := open(t, p), open(t, p)
	dial(t, first, 7)
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	_, err := second.Dial(ctx, 7)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.NoError(t, first.Close())
	began := time.Now()
	dial(t, second, 7)
	assert.Less(t, time.Since(began), 900*time.Millisecond)
}

func TestVMGone(t *testing.T) {
	t.Parallel()
	p := newFakePort(t, false)
	m := serveFake(t, p)
	handle(t, m, 7, echo)
	c := open(t, p)
	conn := dial(t, c, 7)
	blocked := make(chan error, 2)
	go func() {
		_, err := conn.Read(make([]byte, 1))
		blocked <- err
	}()
	full := dial(t, c, 7)
	go func() {
		_, err := full.Write(make([]byte, 4<<20))
		blocked <- err
	}()
	time.Sleep(50 * time.Millisecond)
	require.NoError(t, p.Close())
	for range 2 {
		err := <-blocked
		assert.ErrorIs(t, err, errdefs.ErrUnavailable)
		assert.NotErrorIs(t, err, io.EOF)
	}
	<-c.Done()
}

// TestTornSessions cuts a host off at a random byte, many times. The next host
// is served without waiting for another attempt, and nothing that the first did
// not write is ever read in the guest.
func TestTornSessions(t *testing.T) {
	for _, hidden := range []bool{false, true} {
		t.Run(fmt.Sprintf("hidden=%v", hidden), func(t *testing.T) {
			t.Parallel()
			p := newFakePort(t, hidden)
			m := serveFake(t, p)
			handle(t, m, 7, echo)
			handle(t, m, 9, func(c *Conn) {
				buf := make([]byte, 8192)
				for {
					n, err := c.Read(buf)
					for _, b := range buf[:n] {
						if b != 0x5a {
							t.Errorf("the guest read %#x, which nobody wrote", b)
							return
						}
					}
					if err != nil {
						if errors.Is(err, io.EOF) {
							t.Error("the guest took a torn stream for a whole one")
						}
						return
					}
				}
			})
			rng := rand.New(rand.NewSource(1))
			for range 150 {
				tear(t, p, rng.Intn(150_000))
				began := time.Now()
				c := open(t, p)
				conn := dial(t, c, 7)
				_, err := conn.Write([]byte("whole"))
				require.NoError(t, err)
				got := make([]byte, 5)
				_, err = io.ReadFull(conn, got)
				require.NoError(t, err)
				require.Equal(t, "whole", string(got))
				require.Less(t, time.Since(began), 900*time.Millisecond)
				require.NoError(t, c.Close())
			}
		})
	}
}

// tornConn passes on so many bytes and then closes in the middle.
type tornConn struct {
	net.Conn
	left int
}

func (c *tornConn) Write(b []byte) (int, error) {
	if len(b) >= c.left {
		_, _ = c.Conn.Write(b[:c.left])
		_ = c.Conn.Close()
		return 0, syscall.EPIPE
	}
	c.left -= len(b)
	return c.Conn.Write(b)
}

// tear runs a host that writes to port 9 and vanishes after a number of bytes.
func tear(t *testing.T, p *fakePort, after int) {
	t.Helper()
	raw, err := net.Dial("unix", p.path)
	require.NoError(t, err)
	conn := &tornConn{Conn: raw, left: after}
	defer conn.Close() //nolint:errcheck
	n := newNonce()
	if _, err := conn.Write(preamble(n)); err != nil {
		return
	}
	c, err := handshakeOn(conn, n)
	if err != nil {
		return
	}
	defer c.mux.Close() //nolint:errcheck
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	stream, err := c.open(ctx, 9)
	if err != nil {
		return
	}
	defer stream.Close() //nolint:errcheck
	for {
		if _, err := stream.Write(bytes.Repeat([]byte{0x5a}, 1+rand.Intn(40_000))); err != nil {
			return
		}
	}
}

// TestStaleGuestOutput has the guest's side full of an old session's bytes when
// the host connects.
func TestStaleGuestOutput(t *testing.T) {
	t.Parallel()
	p := newFakePort(t, true)
	m := serveFake(t, p)
	handle(t, m, 7, echo)
	handle(t, m, 8, func(c *Conn) {
		for {
			if _, err := c.Write(make([]byte, 10_000)); err != nil {
				return
			}
		}
	})
	for range 20 {
		c := open(t, p)
		conn := dial(t, c, 8)
		_, err := io.CopyN(io.Discard, conn, 300_000)
		require.NoError(t, err)
		require.NoError(t, c.Close())
	}
	began := time.Now()
	dial(t, open(t, p), 7)
	assert.Less(t, time.Since(began), 900*time.Millisecond)
}

func TestHalfCloseDeliversAll(t *testing.T) {
	t.Parallel()
	p := newFakePort(t, false)
	m := serveFake(t, p)
	const size = 200_000 // fits the window: the writer is done before the reader begins
	handle(t, m, 7, func(c *Conn) {
		_, err := c.Write(bytes.Repeat([]byte{7}, size))
		assert.NoError(t, err)
		// and Close, by handle
	})
	c := open(t, p)
	conn := dial(t, c, 7)
	time.Sleep(500 * time.Millisecond)
	got, err := io.ReadAll(conn)
	require.NoError(t, err)
	require.Len(t, got, size)
}

// TestCloseStopsTheWriter closes a connection that the peer writes to.
func TestCloseStopsTheWriter(t *testing.T) {
	t.Parallel()
	p := newFakePort(t, false)
	m := serveFake(t, p)
	ended := make(chan error, 1)
	handle(t, m, 7, func(c *Conn) {
		for {
			if _, err := c.Write(make([]byte, 64<<10)); err != nil {
				ended <- err
				return
			}
		}
	})
	c := open(t, p)
	conn := dial(t, c, 7)
	_, err := io.CopyN(io.Discard, conn, 1<<20)
	require.NoError(t, err)
	require.NoError(t, conn.Close())
	_, err = conn.Read(make([]byte, 1))
	require.ErrorIs(t, err, net.ErrClosed)
	select {
	case err := <-ended:
		assert.ErrorIs(t, err, syscall.ECONNRESET)
	case <-time.After(10 * time.Second):
		t.Fatal("the guest goes on writing to a closed connection")
	}
	require.Eventually(t, func() bool {
		return c.sess.mux.NumStreams() == 0 && c.sess.link.open() == 0
	}, 5*time.Second, 5*time.Millisecond)
}

func TestDeadlines(t *testing.T) {
	t.Parallel()
	p := newFakePort(t, false)
	m := serveFake(t, p)
	hold := make(chan struct{})
	handle(t, m, 7, func(*Conn) { <-hold })
	t.Cleanup(func() { close(hold) })
	c := open(t, p, WithWriteTimeout(100*time.Millisecond))
	conn := dial(t, c, 7)
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(50*time.Millisecond)))
	_, err := conn.Read(make([]byte, 1))
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	_, err = conn.Write(make([]byte, 1<<20))
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	_, err = conn.Write([]byte("x"))
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)

	blocked := dial(t, c, 7)
	done := make(chan error, 1)
	go func() {
		_, err := blocked.Read(make([]byte, 1))
		done <- err
	}()
	time.Sleep(20 * time.Millisecond)
	require.NoError(t, blocked.Close())
	require.ErrorIs(t, <-done, net.ErrClosed)
}

// TestHungGuest has a guest that answers the handshake and then reads nothing
// more. Calls end by their own limits, and Close at once.
func TestHungGuest(t *testing.T) {
	t.Parallel()
	host, guest := net.Pipe() // has no buffer: a write waits for a read
	defer guest.Close()       //nolint:errcheck
	n := newNonce()
	go func() { _, _ = guest.Write(answer(n)) }()
	sess, err := handshakeOn(host, n)
	require.NoError(t, err)
	c := &Client{ready: make(chan struct{}), done: make(chan struct{}), dials: make(chan struct{}, maxDials), sess: sess}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.start.Do(func() {})
	close(c.ready)
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	for range 3 {
		_, err := c.Dial(ctx, 7)
		require.ErrorIs(t, err, context.DeadlineExceeded)
	}
	require.NoError(t, c.Close())
}

func socketpair(t *testing.T) (net.Conn, net.Conn) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		conns[i], err = net.FileConn(f)
		require.NoError(t, err)
		require.NoError(t, f.Close())
		t.Cleanup(func() { _ = conns[i].Close() })
	}
	return conns[0], conns[1]
}
