// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package transport

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// fakeVsock is a VMM's socket for vsock: it answers "CONNECT port" as answer says, and
// hands what it has connected to the guest.
type fakeVsock struct {
	l      net.Listener
	answer func(line string, c net.Conn) bool
	guest  chan net.Conn
	wg     sync.WaitGroup
}

func newFakeVsock(t *testing.T, answer func(string, net.Conn) bool) *fakeVsock {
	t.Helper()
	dir, err := os.MkdirTemp("", "vsock")
	require.NoError(t, err)
	l, err := net.Listen("unix", filepath.Join(dir, "v.sock"))
	require.NoError(t, err)
	v := &fakeVsock{l: l, answer: answer, guest: make(chan net.Conn)}
	ctx, cancel := context.WithCancel(context.Background())
	v.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			line, err := readLine(c)
			if err != nil || !v.answer(line, c) {
				_ = c.Close()
				continue
			}
			select {
			case v.guest <- c:
			case <-ctx.Done():
				_ = c.Close()
			}
		}
	})
	mux := NewMux()
	echo, err := mux.Listen(7)
	require.NoError(t, err)
	v.wg.Go(func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			v.wg.Go(func() { _, _ = io.Copy(c, c); _ = c.Close() })
		}
	})
	v.wg.Go(func() { _ = mux.ServeListener(ctx, guestListener{v.guest, ctx}) })
	t.Cleanup(func() {
		cancel()
		_ = l.Close()
		_ = echo.Close()
		v.wg.Wait()
		_ = os.RemoveAll(dir)
	})
	return v
}

// readLine reads no more than a line.
func readLine(c net.Conn) (string, error) {
	var line []byte
	for b := make([]byte, 1); ; line = append(line, b[0]) {
		if _, err := io.ReadFull(c, b); err != nil {
			return "", err
		}
		if b[0] == '\n' {
			return string(line), nil
		}
	}
}

type guestListener struct {
	conns chan net.Conn
	ctx   context.Context
}

func (l guestListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.ctx.Done():
		return nil, net.ErrClosed
	}
}
func (l guestListener) Close() error   { return nil }
func (l guestListener) Addr() net.Addr { return Addr(0) }

func (v *fakeVsock) client(t *testing.T) *Client {
	t.Helper()
	c, err := Open(VsockEndpoint(v.l.Addr().String(), VsockPod))
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func ok(_ string, c net.Conn) bool {
	_, err := io.WriteString(c, "OK 1073741824\n")
	return err == nil
}

// Over vsock a session is what it is over a serial port.
func TestVsock(t *testing.T) {
	t.Parallel()
	lines := make(chan string, 10)
	v := newFakeVsock(t, func(line string, c net.Conn) bool {
		lines <- line
		return ok(line, c)
	})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for range 3 { // one host after another
		c := v.client(t)
		conn, err := c.Dial(ctx, 7)
		require.NoError(t, err)
		_, err = io.WriteString(conn, "hello\n")
		require.NoError(t, err)
		got, err := bufio.NewReader(conn).ReadString('\n')
		require.NoError(t, err)
		assert.Equal(t, "hello\n", got)
		_, err = c.Dial(ctx, 8)
		require.ErrorIs(t, err, errdefs.ErrNotFound)
		require.NoError(t, c.Close())
	}
	assert.Equal(t, fmt.Sprintf("CONNECT %d", VsockPod), <-lines)
}

// As long as nobody listens in the guest, the VMM hangs up, and the host asks again.
func TestVsockWaitsForTheGuest(t *testing.T) {
	t.Parallel()
	tries := 0
	v := newFakeVsock(t, func(line string, c net.Conn) bool {
		tries++
		return tries > 3 && ok(line, c)
	})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	conn, err := v.client(t).Dial(ctx, 7)
	require.NoError(t, err)
	require.NoError(t, conn.Close())

	// The VMM that ends its connection has not ended a stream.
	v = newFakeVsock(t, ok)
	c := v.client(t)
	conn, err = c.Dial(ctx, 7)
	require.NoError(t, err)
	_ = c.sess.link.close()
	_, err = conn.Read(make([]byte, 1))
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
}

// What a VMM may not answer.
func TestVsockAnswers(t *testing.T) {
	t.Parallel()
	for _, answer := range []string{"NO\n", "OKAY 1\n", strings.Repeat("O", 100), "\n"} {
		ours, theirs := net.Pipe()
		go func() {
			_, _ = readLine(theirs)
			_, _ = io.WriteString(theirs, answer)
			_ = theirs.Close()
		}()
		require.Error(t, connectVsock(ours, 1), "%q", answer)
		_ = ours.Close()
	}
}

func TestVsockEndpoints(t *testing.T) {
	t.Parallel()
	path, port, err := parseEndpoint(VsockEndpoint("/run/a:b/v.sock", 1025))
	require.NoError(t, err)
	assert.Equal(t, "/run/a:b/v.sock", path)
	assert.Equal(t, uint32(1025), port)
	for _, wrong := range []string{"vsock+unix:///run/v.sock", "vsock+unix:///run/v.sock:", "vsock+unix:///run/v.sock:0", "vsock+unix://:5", "vsock+unix://v.sock:5", "vsock+unix:///v:99999999999"} {
		_, err := Open(wrong)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, wrong)
	}
}
