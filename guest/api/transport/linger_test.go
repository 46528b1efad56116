// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package transport

import (
	"bufio"
	"context"
	"encoding/binary"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/yamux"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// deafReader reads frames and keeps the resets to itself.
type deafReader struct {
	r     io.Reader
	frame []byte
}

func (d *deafReader) Read(p []byte) (int, error) {
	for len(d.frame) == 0 {
		frame := make([]byte, headerSize, maxFrame)
		if _, err := io.ReadFull(d.r, frame); err != nil {
			return 0, err
		}
		size := headerSize + 1
		if frame[1] == typeData {
			size += int(binary.BigEndian.Uint32(frame[8:]))
		}
		frame = frame[:size]
		if _, err := io.ReadFull(d.r, frame[headerSize:]); err != nil {
			return 0, err
		}
		if binary.BigEndian.Uint16(frame[2:])&flagRST == 0 {
			d.frame = frame
		}
	}
	n := copy(p, d.frame)
	d.frame = d.frame[n:]
	return n, nil
}

// deafGuest is a guest that takes no notice of resets. It serves port 7 by f.
func deafGuest(t *testing.T, f func(*Conn)) *Client {
	t.Helper()
	host, guest := socketpair(t)
	n := newNonce()
	_, err := guest.Write(answer(n))
	require.NoError(t, err)
	sess, err := handshakeOn(host, n)
	require.NoError(t, err)
	c := &Client{ready: make(chan struct{}), done: make(chan struct{}), dials: make(chan struct{}, maxDials), sess: sess}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.start.Do(func() {})
	close(c.ready)

	m := &testMux{Mux: NewMux()}
	l := newLink(bufio.NewReaderSize(&deafReader{r: guest}, maxFrame), guest, guest.Close, true)
	mux, err := yamux.Server(l, yamuxConfig())
	require.NoError(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			stream, err := mux.AcceptStream()
			if err != nil {
				return
			}
			wg.Go(func() { m.hand(newConn(stream, l, 0)) })
		}
	})
	t.Cleanup(func() {
		_ = c.Close()
		_ = mux.Close()
		wg.Wait()
		m.wg.Wait()
	})
	handle(t, m, 7, f)
	return c
}

// hold keeps a connection open until the host ends the session.
func hold(c *Conn) { <-c.stream.Session().CloseChan() }

// A guest whose programs never end a connection that the host has closed loses
// the oldest of these to resets, and goes on.
func TestLingeringIsBounded(t *testing.T) {
	t.Parallel()
	p := newFakePort(t, false)
	m := serveFake(t, p)
	handle(t, m, 7, hold)
	handle(t, m, 8, echo)
	c := open(t, p)
	dial(t, c, 8)
	c.sess.link.resetWait = time.Second // a busy machine's guest may take some time to answer
	closed := make([]*Conn, maxLingering+40)
	for i := range closed {
		closed[i] = dial(t, c, 7)
		require.NoError(t, closed[i].Close())
	}
	l := c.sess.link
	require.Eventually(t, func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.lingering) == maxLingering && l.overdue == nil
	}, 10*time.Second, 5*time.Millisecond)
	assert.True(t, closed[0].reset.Load())
	assert.False(t, closed[len(closed)-1].reset.Load(), "the guest ends the newest in its own time")
	dial(t, c, 8)
}

// A guest that answers no resets either loses the session, but only for many.
func TestUnansweredResets(t *testing.T) {
	t.Parallel()
	c := deafGuest(t, hold)
	c.sess.link.resetWait = 100 * time.Millisecond
	for range maxLingering {
		require.NoError(t, dial(t, c, 7).Close())
	}
	select {
	case <-c.sess.mux.CloseChan():
		t.Fatal("the session ended though so many may linger")
	case <-time.After(200 * time.Millisecond):
	}
	require.NoError(t, dial(t, c, 7).Close())
	awaitEnd(t, c)
}

// A guest that goes on sending after a reset loses the session. That the first
// window after it is let pass is what TestCloseStopsTheWriter needs.
func TestSendingAfterReset(t *testing.T) {
	t.Parallel()
	sent := make(chan struct{})
	c := deafGuest(t, func(c *Conn) {
		for {
			if _, err := c.Write(make([]byte, 64<<10)); err != nil {
				close(sent)
				return
			}
		}
	})
	conn := dial(t, c, 7)
	_, err := io.CopyN(io.Discard, conn, 1<<20)
	require.NoError(t, err)
	require.NoError(t, conn.Close())
	awaitEnd(t, c)
	<-sent
}

// What the guest had sent before it learns of the reset is no offence, however
// many connections are closed at once.
func TestManyWritersAreStopped(t *testing.T) {
	t.Parallel()
	p := newFakePort(t, false)
	m := serveFake(t, p)
	handle(t, m, 7, func(c *Conn) {
		for {
			if _, err := c.Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
	})
	handle(t, m, 8, echo)
	c := open(t, p)
	conns := make([]net.Conn, 2*maxLingering)
	for i := range conns {
		conns[i] = dial(t, c, 7)
	}
	for _, conn := range conns {
		go func() { _ = conn.Close() }()
	}
	require.Eventually(t, func() bool { return c.sess.link.open() == 0 }, 20*time.Second, 5*time.Millisecond)
	dial(t, c, 8)
}

func awaitEnd(t *testing.T, c *Client) {
	t.Helper()
	select {
	case <-c.sess.mux.CloseChan():
	case <-time.After(10 * time.Second):
		t.Fatal("the session goes on")
	}
}
