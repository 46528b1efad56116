// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package transport

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// fakePort behaves as a virtio-serial port: its host side is a unix socket that
// serves one client at a time, its guest side never ends, reads as io.EOF
// without a host and keeps what a host left unread.
type fakePort struct {
	path   string
	l      net.Listener
	hidden bool // the guest does not get to see that a host went

	mu       sync.Mutex
	cond     *sync.Cond
	in       []byte
	host     net.Conn
	expired  bool
	isClosed bool
	wg       sync.WaitGroup
}

const fakePortBuffer = 128 << 10

func newFakePort(t testing.TB, hidden bool) *fakePort {
	t.Helper()
	dir, err := os.MkdirTemp("", "port")
	require.NoError(t, err)
	p := &fakePort{path: filepath.Join(dir, "p.sock"), hidden: hidden}
	p.cond = sync.NewCond(&p.mu)
	p.l, err = net.Listen("unix", p.path)
	require.NoError(t, err)
	p.wg.Go(p.acceptLoop)
	t.Cleanup(func() {
		_ = p.Close()
		_ = os.RemoveAll(dir)
		p.wg.Wait()
	})
	return p
}

func (p *fakePort) endpoint() string { return SerialEndpoint(p.path) }

func (p *fakePort) acceptLoop() {
	for {
		conn, err := p.l.Accept()
		if err != nil {
			return
		}
		p.mu.Lock()
		p.host = conn
		if p.isClosed {
			_ = conn.Close()
		}
		p.cond.Broadcast()
		p.mu.Unlock()
		p.fill(conn)
		_ = conn.Close()
		p.mu.Lock()
		p.host = nil
		p.cond.Broadcast()
		p.mu.Unlock()
	}
}

func (p *fakePort) fill(conn net.Conn) {
	buf := make([]byte, 4096)
	for {
		n, err := conn.Read(buf)
		p.mu.Lock()
		for len(p.in) > fakePortBuffer && !p.isClosed {
			p.cond.Wait()
		}
		p.in = append(p.in, buf[:n]...)
		p.cond.Broadcast()
		p.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (p *fakePort) Read(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		switch {
		case p.isClosed:
			return 0, os.ErrClosed
		case p.expired:
			return 0, os.ErrDeadlineExceeded
		case len(p.in) > 0:
			n := copy(b, p.in)
			p.in = append(p.in[:0], p.in[n:]...)
			p.cond.Broadcast()
			return n, nil
		case p.host == nil && !p.hidden:
			return 0, io.EOF
		}
		p.cond.Wait()
	}
}

func (p *fakePort) Write(b []byte) (int, error) {
	p.mu.Lock()
	for p.host == nil && !p.expired && !p.isClosed {
		p.cond.Wait()
	}
	host := p.host
	switch {
	case p.isClosed:
		p.mu.Unlock()
		return 0, os.ErrClosed
	case p.expired:
		p.mu.Unlock()
		return 0, os.ErrDeadlineExceeded
	}
	p.mu.Unlock()
	n, err := host.Write(b)
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return len(b), nil // a port loses what its host does not take
	}
	return n, err
}

func (p *fakePort) SetDeadline(t time.Time) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.expired = !t.IsZero()
	if p.host != nil {
		_ = p.host.SetWriteDeadline(t)
	}
	p.cond.Broadcast()
	return nil
}

func (p *fakePort) Close() error {
	_ = p.l.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.isClosed = true
	if p.host != nil {
		_ = p.host.Close()
	}
	p.cond.Broadcast()
	return nil
}

func (p *fakePort) awaitData() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for !p.isClosed && (len(p.in) == 0 || p.host == nil) {
		p.cond.Wait()
	}
	if p.isClosed {
		return os.ErrClosed
	}
	return nil
}

// testMux is a Mux with its handlers.
type testMux struct {
	*Mux
	wg sync.WaitGroup
}

// serveFake runs a Mux on a fake port until the test ends.
func serveFake(t testing.TB, p *fakePort) *testMux {
	t.Helper()
	m := &testMux{Mux: NewMux()}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.serve(ctx, p, p.awaitData) }()
	t.Cleanup(func() {
		cancel()
		<-done
		m.wg.Wait()
	})
	return m
}

// handle serves each connection of a port by f until the test ends.
func handle(t testing.TB, m *testMux, port uint32, f func(*Conn)) {
	t.Helper()
	l, err := m.Listen(port)
	require.NoError(t, err)
	t.Cleanup(func() { _ = l.Close() })
	m.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			m.wg.Go(func() {
				defer c.Close() //nolint:errcheck
				f(c.(*Conn))
			})
		}
	})
}

func echo(c *Conn) {
	_, _ = io.Copy(c, c)
	_ = c.CloseWrite()
}

func open(t testing.TB, p *fakePort, opts ...Option) *Client {
	t.Helper()
	c, err := Open(p.endpoint(), opts...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func dial(t testing.TB, c *Client, port uint32) *Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	conn, err := c.Dial(ctx, port)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn.(*Conn)
}
