// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// pattern is what the process "bytes" writes, over and over. Its length is a
// prime, so that no buffer's size hides a byte that is lost.
var pattern = func() []byte {
	p := make([]byte, 65521)
	for i := range p {
		p[i] = byte(i ^ i>>8)
	}
	return p
}()

func writePattern(w io.Writer, n int) error {
	for n > 0 {
		chunk := pattern[:min(n, len(pattern))]
		if _, err := w.Write(chunk); err != nil {
			return err
		}
		n -= len(chunk)
	}
	return nil
}

// checkPattern reads to the end, and returns at which byte of the pattern's
// output that is. at is where r begins.
func checkPattern(r io.Reader, at int) (int, error) {
	buf := make([]byte, 64<<10)
	for {
		n, err := r.Read(buf)
		for got := buf[:n]; len(got) > 0; {
			want := pattern[at%len(pattern):]
			want = want[:min(len(want), len(got))]
			if !bytes.Equal(want, got[:len(want)]) {
				return at, fmt.Errorf("wrong after byte %d", at)
			}
			at += len(want)
			got = got[len(want):]
		}
		if errors.Is(err, io.EOF) {
			return at, nil
		}
		if err != nil {
			return at, err
		}
	}
}

// connPair is a connected pair of unix sockets.
func connPair(t testing.TB) (net.Conn, net.Conn) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		conns[i], err = net.FileConn(f)
		require.NoError(t, err)
		_ = f.Close()
	}
	return conns[0], conns[1]
}

// connListener is a net.Listener for connections that are made by hand.
type connListener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newConnListener() *connListener {
	return &connListener{conns: make(chan net.Conn, 4), done: make(chan struct{})}
}

func (l *connListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *connListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *connListener) Addr() net.Addr { return &net.UnixAddr{Name: "guest"} }

// eventually waits for a condition that no event tells.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	require.Eventually(t, cond, 20*time.Second, 5*time.Millisecond, what)
}
