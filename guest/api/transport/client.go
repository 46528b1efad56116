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
	"io/fs"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/hashicorp/yamux"
)

const (
	schemeSerial = "serial+unix"
	schemeVsock  = "vsock+unix"
	// firstWait is how long the host waits for an answer before it connects anew;
	// it doubles up to maxWait.
	firstWait = time.Second
	maxWait   = 8 * time.Second
	// retryPause keeps attempts that fail at once apart.
	retryPause = 50 * time.Millisecond
	// maxDials bounds the dials that wait for the guest's answer.
	maxDials = 64
	// maxConns bounds the connections, those included that the guest does not end.
	maxConns = 4096
)

// The guest's answer to the port of a stream.
const (
	statusOK      = 0
	statusRefused = 1
)

// SerialEndpoint is the endpoint of a virtio-serial port whose host side is the
// unix socket at path, which is absolute.
func SerialEndpoint(path string) string { return schemeSerial + "://" + path }

// VsockEndpoint is the endpoint of a vsock port of a guest whose VMM listens on the
// unix socket at path, which is absolute, and connects by "CONNECT port" (hybrid vsock).
func VsockEndpoint(path string, port uint32) string {
	return fmt.Sprintf("%s://%s:%d", schemeVsock, path, port)
}

// Option changes how a Client behaves.
type Option func(*Client)

// WithWriteTimeout sets Conn.SetWriteTimeout on each connection. Without it
// there is no limit.
func WithWriteTimeout(d time.Duration) Option {
	return func(c *Client) { c.writeTimeout = d }
}

// WithReader has what the guest sends read by the reader that wrap returns, the handshake
// too. It serves hosts that read a guest no faster than they mean to.
func WithReader(wrap func(io.Reader) io.Reader) Option {
	return func(c *Client) { c.wrap = wrap }
}

// Client holds the host's end of a transport. Its methods may be called
// concurrently.
type Client struct {
	path         string
	port         uint32 // of vsock; 0 is a serial port
	writeTimeout time.Duration
	wrap         func(io.Reader) io.Reader

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	start  sync.Once
	ready  chan struct{} // closed when sess is set, or err
	done   chan struct{}
	dials  chan struct{}
	wg     sync.WaitGroup

	mu   sync.Mutex
	sess *session
	err  error // why there is or will be no session
	last error // why the last attempt failed
}

// Open makes a client for an endpoint such as serial+unix:///run/x/pod.sock or
// vsock+unix:///run/x/v.sock:1025. It connects at the first Dial. ErrInvalidArgument
// is for an endpoint that it does not know.
func Open(endpoint string, opts ...Option) (*Client, error) {
	path, port, err := parseEndpoint(endpoint)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	c := &Client{
		path: path, port: port, ctx: ctx, cancel: cancel,
		ready: make(chan struct{}), done: make(chan struct{}), dials: make(chan struct{}, maxDials),
		wrap: func(r io.Reader) io.Reader { return r },
	}
	for _, o := range opts {
		o(c)
	}
	return c, nil
}

// parseEndpoint is the inverse of SerialEndpoint and VsockEndpoint.
func parseEndpoint(endpoint string) (path string, port uint32, _ error) {
	scheme, path, ok := strings.Cut(endpoint, "://")
	if ok && scheme == schemeVsock {
		colon := strings.LastIndexByte(path, ':')
		n, err := strconv.ParseUint(path[colon+1:], 10, 32)
		if ok = colon > 0 && err == nil && n > 0; ok {
			path, port = path[:colon], uint32(n)
		}
	}
	if !ok || scheme != schemeSerial && scheme != schemeVsock || !filepath.IsAbs(path) {
		return "", 0, fmt.Errorf("guest endpoint %q: want %s:///absolute/path or %s:///absolute/path:port: %w",
			endpoint, schemeSerial, schemeVsock, errdefs.ErrInvalidArgument)
	}
	return path, port, nil
}

// Dial connects to a port of the guest; the result is a *Conn. It waits while
// the guest starts, and while another process holds the endpoint. ErrUnavailable
// means that the VM or the client has gone, ErrNotFound that nobody listens.
func (c *Client) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	c.start.Do(func() { c.spawn(c.run) })
	select {
	case <-c.ready:
	case <-c.ctx.Done():
	case <-ctx.Done():
		c.mu.Lock()
		defer c.mu.Unlock()
		return nil, fmt.Errorf("dial guest port %d: no session with the guest yet: %w", port, errors.Join(ctx.Err(), c.last))
	}
	c.mu.Lock()
	sess, err := c.sess, c.err
	c.mu.Unlock()
	if sess == nil {
		return nil, fmt.Errorf("dial guest port %d: %w", port, errors.Join(err, errLost))
	}
	select {
	case c.dials <- struct{}{}:
	case <-sess.mux.CloseChan():
		return nil, fmt.Errorf("dial guest port %d: %w", port, errLost)
	case <-ctx.Done():
		return nil, fmt.Errorf("dial guest port %d: too many dials wait for the guest: %w", port, ctx.Err())
	}
	if n := sess.link.open(); n >= maxConns {
		<-c.dials
		return nil, fmt.Errorf("dial guest port %d: %d connections are open: %w", port, n, errdefs.ErrResourceExhausted)
	}
	conn, err := c.dial(ctx, sess, port)
	if err != nil {
		return nil, fmt.Errorf("dial guest port %d: %w", port, err)
	}
	conn.SetWriteTimeout(c.writeTimeout)
	return conn, nil
}

// dial opens a stream in a goroutine of its own, as yamux knows no contexts. It
// gives back the place in c.dials.
func (c *Client) dial(ctx context.Context, sess *session, port uint32) (*Conn, error) {
	type result struct {
		conn *Conn
		err  error
	}
	done := make(chan result)
	spawned := c.spawn(func() {
		defer func() { <-c.dials }()
		conn, err := sess.open(ctx, port)
		select {
		case done <- result{conn, err}:
		case <-ctx.Done():
			if conn != nil {
				_ = conn.Close()
			}
		}
	})
	if !spawned {
		return nil, errLost
	}
	select {
	case r := <-done:
		return r.conn, r.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// spawn runs f in a goroutine that Close waits for, unless Close was called.
func (c *Client) spawn(f func()) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() != nil {
		return false
	}
	c.wg.Go(f)
	return true
}

// Done is closed when an established connection to the guest was lost, or when
// nothing serves the endpoint any more: the VM is gone, or its agent is. A
// Client does not connect again after that.
func (c *Client) Done() <-chan struct{} { return c.done }

// Close ends all connections of this client and lets another one have the endpoint.
func (c *Client) Close() error {
	c.mu.Lock()
	c.cancel()
	sess := c.sess
	c.mu.Unlock()
	if sess != nil {
		_ = sess.mux.Close()
	}
	c.wg.Wait()
	return nil
}

// run connects until that succeeds once, and then waits for the session's end.
func (c *Client) run() {
	sess, err := c.connect()
	c.mu.Lock()
	c.sess, c.err = sess, err
	c.mu.Unlock()
	close(c.ready)
	if err == nil {
		select {
		case <-sess.mux.CloseChan():
		case <-c.ctx.Done():
		}
		_ = sess.mux.Close()
	}
	if c.ctx.Err() == nil {
		close(c.done)
	}
}

func (c *Client) connect() (*session, error) {
	for wait := firstWait; ; wait = min(2*wait, maxWait) {
		began := time.Now()
		sess, err := c.attempt(wait)
		if err == nil {
			return sess, nil
		}
		if c.ctx.Err() != nil || errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		c.mu.Lock()
		c.last = err
		c.mu.Unlock()
		rest := retryPause - time.Since(began)
		if errors.Is(err, errNoAnswer) {
			// A guest that babbles is not read again at once.
			rest = wait
		}
		pause := time.NewTimer(max(0, rest))
		select {
		case <-pause.C:
		case <-c.ctx.Done():
			pause.Stop()
		}
	}
}

// attempt connects once and waits for the guest's answer.
func (c *Client) attempt(wait time.Duration) (_ *session, retErr error) {
	var d net.Dialer
	ctx, cancel := context.WithTimeout(c.ctx, wait)
	defer cancel()
	conn, err := d.DialContext(ctx, "unix", c.path)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer func() {
		if !stop() {
			retErr = fmt.Errorf("no answer from the guest within %v: %w", wait, ctx.Err())
		}
		if retErr != nil {
			_ = conn.Close()
		}
	}()
	if c.port != 0 {
		if err := connectVsock(conn, c.port); err != nil {
			return nil, err
		}
	}
	n := newNonce()
	if _, err := conn.Write(preamble(n)); err != nil {
		return nil, fmt.Errorf("begin the handshake: %w", err)
	}
	return handshakeOn(readBy{conn, c.wrap(conn)}, n)
}

// readBy is a connection that is read by another reader.
type readBy struct {
	net.Conn
	r io.Reader
}

func (c readBy) Read(p []byte) (int, error) { return c.r.Read(p) }

// session is the host's end of one.
type session struct {
	mux  *yamux.Session
	link *link
}

// handshakeOn waits for the guest's answer to n, and starts the session.
func handshakeOn(conn net.Conn, n nonce) (*session, error) {
	r := bufio.NewReaderSize(conn, maxFrame)
	if err := scanAnswer(r, n); err != nil {
		return nil, err
	}
	l := newLink(r, conn, conn.Close, false)
	mux, err := yamux.Client(l, yamuxConfig())
	if err != nil {
		return nil, err
	}
	return &session{mux: mux, link: l}, nil
}

// open opens a stream to a port.
func (s *session) open(ctx context.Context, port uint32) (_ *Conn, retErr error) {
	stream, err := s.mux.OpenStream()
	if err != nil {
		return nil, errors.Join(err, errLost)
	}
	conn := newConn(stream, s.link, port)
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer func() {
		if !stop() && retErr == nil {
			retErr = ctx.Err()
		}
		if retErr != nil {
			_ = conn.Close()
		}
	}()
	if _, err := conn.Write(binary.BigEndian.AppendUint32(nil, port)); err != nil {
		return nil, err
	}
	var status [1]byte
	switch _, err := io.ReadFull(conn, status[:]); {
	case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET):
		return nil, fmt.Errorf("the guest closed the connection: %w", errdefs.ErrNotFound)
	case err != nil:
		return nil, err
	}
	if status[0] != statusOK {
		return nil, fmt.Errorf("nobody listens in the guest: %w", errdefs.ErrNotFound)
	}
	return conn, nil
}
