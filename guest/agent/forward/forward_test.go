// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package forward

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/cloudhv/containerd-cloudhv/guest/api"
)

// here stands for the pod's network namespace.
func here(f func() error) error { return f() }

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve runs a Server on a unix socket, which stands in for the transport, and returns
// how to connect.
func serve(t *testing.T, s *Server) func() *net.UnixConn {
	t.Helper()
	addr := &net.UnixAddr{Net: "unix", Name: filepath.Join(t.TempDir(), "s")}
	l, err := net.ListenUnix("unix", addr)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		require.NoError(t, <-ended)
	})
	return func() *net.UnixConn {
		conn, err := net.DialUnix("unix", nil, addr)
		require.NoError(t, err)
		require.NoError(t, conn.SetDeadline(time.Now().Add(time.Minute)))
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
}

// ask sends a request and returns the answer.
func ask(t *testing.T, conn net.Conn, port int) byte {
	t.Helper()
	_, err := conn.Write(binary.BigEndian.AppendUint16(nil, uint16(port)))
	require.NoError(t, err)
	var answer [1]byte
	_, err = io.ReadFull(conn, answer[:])
	require.NoError(t, err)
	return answer[0]
}

// service answers with what it got, once that has ended.
func service(t *testing.T, addr string) int {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Skipf("no %s here: %v", addr, err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			all, _ := io.ReadAll(conn)
			_, _ = conn.Write(append([]byte("got "), all...))
			_ = conn.Close()
		}
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-ended
	})
	return l.Addr().(*net.TCPAddr).Port
}

// A service is found at whichever address of localhost it listens.
func TestServices(t *testing.T) {
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0", "0.0.0.0:0", "[::]:0"} {
		t.Run(addr, func(t *testing.T) {
			port := service(t, addr)
			conn := serve(t, NewServer(here))()
			require.Equal(t, byte(api.ForwardAccepted), ask(t, conn, port))
			_, err := conn.Write([]byte("a question"))
			require.NoError(t, err)
			require.NoError(t, conn.CloseWrite())
			got, err := io.ReadAll(conn)
			require.NoError(t, err)
			require.Equal(t, "got a question", string(got))
		})
	}
}

func TestRefused(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	port := l.Addr().(*net.TCPAddr).Port
	require.NoError(t, l.Close())
	dial := serve(t, NewServer(here))
	for _, port := range []int{port, 0} {
		conn := dial()
		require.Equal(t, byte(api.ForwardRefused), ask(t, conn, port))
		_, err = conn.Read(make([]byte, 1))
		require.ErrorIs(t, err, io.EOF)
	}
}

// A service whose queue is full gets so much time.
func TestAServiceThatDoesNotAccept(t *testing.T) {
	s := NewServer(here)
	s.dial = time.Nanosecond
	port := service(t, "127.0.0.1:0")
	conn := serve(t, s)()
	require.Equal(t, byte(api.ForwardFailed), ask(t, conn, port))
}

// More connections than there may be are refused, those that say nothing are ended,
// and places become free.
func TestLimits(t *testing.T) {
	s := NewServer(here)
	s.slots = make(chan struct{}, 2)
	s.request = 300 * time.Millisecond
	dial := serve(t, s)
	port := service(t, "127.0.0.1:0")
	silent := dial()
	held := dial()
	require.Equal(t, byte(api.ForwardAccepted), ask(t, held, port))
	third := dial()
	var answer [1]byte
	_, err := io.ReadFull(third, answer[:])
	require.NoError(t, err)
	require.Equal(t, byte(api.ForwardBusy), answer[0])
	_, err = silent.Read(answer[:])
	require.ErrorIs(t, err, io.EOF)
	require.Eventually(t, func() bool { return len(s.slots) == 1 }, 10*time.Second, 5*time.Millisecond)
	require.Equal(t, byte(api.ForwardAccepted), ask(t, dial(), port))
	require.NoError(t, held.Close())
}
