// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package transport

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/hashicorp/yamux"
)

// acceptWait is how long a new stream may take to name its port, and then to be
// accepted.
const acceptWait = 10 * time.Second

// Mux is the guest's end of the transports: it hands the connections that hosts
// open to listeners. Call Listen before ServeDevice, or early dials are refused.
type Mux struct {
	mu        sync.Mutex
	listeners map[uint32]*listener
}

// NewMux makes a Mux without listeners.
func NewMux() *Mux { return &Mux{listeners: make(map[uint32]*listener)} }

// Listen returns the listener of a port, for all devices that the Mux serves. It
// outlives sessions and devices; its Accept fails only after its Close.
// ErrAlreadyExists means that the port has one.
func (m *Mux) Listen(port uint32) (net.Listener, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.listeners[port] != nil {
		return nil, fmt.Errorf("listen on port %d: %w", port, errdefs.ErrAlreadyExists)
	}
	l := &listener{mux: m, port: port, conns: make(chan *Conn), done: make(chan struct{})}
	m.listeners[port] = l
	return l, nil
}

func (m *Mux) listener(port uint32) *listener {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.listeners[port]
}

type listener struct {
	mux   *Mux
	port  uint32
	conns chan *Conn
	done  chan struct{}
	once  sync.Once
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.once.Do(func() {
		l.mux.mu.Lock()
		delete(l.mux.listeners, l.port)
		l.mux.mu.Unlock()
		close(l.done)
	})
	return nil
}

func (l *listener) Addr() net.Addr { return Addr(l.port) }

// device is the guest's end of a transport's bytes. Read returns io.EOF without
// a host; SetDeadline ends calls that are under way.
type device interface {
	io.ReadWriteCloser
	SetDeadline(t time.Time) error
}

// serve runs session after session on an open device, until it fails or ends.
// awaitData is called before each session and returns when there is input.
func (m *Mux) serve(ctx context.Context, dev device, awaitData func() error) error {
	stop := context.AfterFunc(ctx, func() { _ = dev.Close() })
	defer stop()
	r := bufio.NewReaderSize(dev, maxFrame)
	for {
		if r.Buffered() == 0 {
			if err := awaitData(); err != nil {
				return err
			}
		}
		n, err := scanPreamble(r)
		if err == nil {
			_, err = dev.Write(answer(n))
		}
		if err == nil {
			err = m.session(r, dev)
		}
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, errFrame):
			// The next host is there already: what is buffered is its preamble.
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			// The host has gone, and what it left half-sent is of no use.
			_, _ = r.Discard(r.Buffered())
		default:
			return err
		}
	}
}

// session serves one host until it has gone, and returns why: io.EOF, or
// errFrame when the next host's preamble arrived.
func (m *Mux) session(r *bufio.Reader, dev device) error {
	l := newLink(r, dev, func() error { return dev.SetDeadline(time.Unix(1, 0)) }, true)
	mux, err := yamux.Server(l, yamuxConfig())
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	for {
		stream, err := mux.AcceptStream()
		if err != nil {
			break
		}
		wg.Go(func() { m.hand(newConn(stream, l, 0)) })
	}
	// It waits for yamux's reader and writer, also if one of them began it.
	_ = mux.Close()
	wg.Wait()
	l.retire()
	return errors.Join(l.err, dev.SetDeadline(time.Time{}))
}

// hand reads the port of a new connection and gives it to the port's listener.
func (m *Mux) hand(c *Conn) {
	var port [4]byte
	_ = c.SetReadDeadline(time.Now().Add(acceptWait))
	if _, err := io.ReadFull(c, port[:]); err != nil {
		_ = c.Close()
		return
	}
	_ = c.SetReadDeadline(time.Time{})
	c.port = binary.BigEndian.Uint32(port[:])
	l := m.listener(c.port)
	if l == nil {
		refuse(c)
		return
	}
	timer := time.NewTimer(acceptWait)
	defer timer.Stop()
	// The status goes first: the listener's owner may write as soon as it has c.
	if _, err := c.Write([]byte{statusOK}); err != nil {
		_ = c.Close()
		return
	}
	select {
	case l.conns <- c:
	case <-l.done:
		_ = c.Close()
	case <-timer.C:
		_ = c.Close()
	case <-c.stream.Session().CloseChan():
		_ = c.Close()
	}
}

func refuse(c *Conn) {
	_, _ = c.Write([]byte{statusRefused})
	_ = c.Close()
}
