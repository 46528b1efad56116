// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package relay

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pair is a TCP connection.
func pair(t *testing.T) (near, far *net.TCPConn) {
	t.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	require.NoError(t, err)
	defer l.Close()
	near, err = net.DialTCP("tcp", nil, l.Addr().(*net.TCPAddr))
	require.NoError(t, err)
	far, err = l.AcceptTCP()
	require.NoError(t, err)
	for _, c := range []*net.TCPConn{near, far} {
		require.NoError(t, c.SetDeadline(time.Now().Add(time.Minute)))
		t.Cleanup(func() { _ = c.Close() })
	}
	return near, far
}

// start relays between two connections, and gives their far ends.
func start(t *testing.T) (client, service *net.TCPConn, ended chan error) {
	t.Helper()
	client, a := pair(t)
	service, b := pair(t)
	for _, c := range []*net.TCPConn{a, b} {
		require.NoError(t, c.SetDeadline(time.Time{}))
		require.NoError(t, c.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: time.Second, Interval: time.Second, Count: 3}))
	}
	ended = make(chan error, 1)
	go func() { ended <- Run(a, b) }()
	return client, service, ended
}

// Either direction may end first, and the other goes on until it ends too.
func TestEachDirectionHasItsEnd(t *testing.T) {
	t.Parallel()
	data := bytes.Repeat([]byte("0123456789abcdef"), 100_000)
	for _, clientFirst := range []bool{true, false} {
		client, service, ended := start(t)
		first, second := client, service
		if !clientFirst {
			first, second = service, client
		}
		for _, c := range []struct{ from, to *net.TCPConn }{{first, second}, {second, first}} {
			go func() {
				_, _ = c.from.Write(data)
				_ = c.from.CloseWrite()
			}()
			got, err := io.ReadAll(c.to)
			require.NoError(t, err)
			require.True(t, bytes.Equal(data, got))
		}
		require.NoError(t, <-ended)
	}
}

// A reset passes through, and is no end.
func TestAResetPasses(t *testing.T) {
	t.Parallel()
	for _, byClient := range []bool{true, false} {
		for _, afterEnd := range []bool{false, true} {
			client, service, ended := start(t)
			resetting, other := client, service
			if !byClient {
				resetting, other = service, client
			}
			if afterEnd {
				// The other one has ended its direction and waits.
				require.NoError(t, other.CloseWrite())
				_, err := resetting.Read(make([]byte, 1))
				require.ErrorIs(t, err, io.EOF)
			}
			require.NoError(t, resetting.SetLinger(0))
			require.NoError(t, resetting.Close())
			_, err := other.Read(make([]byte, 1))
			require.ErrorIs(t, err, unix.ECONNRESET)
			require.Error(t, <-ended)
		}
	}
}

// Who ends a direction and then goes away altogether holds nothing for ever, though the
// other side neither writes nor ends.
func TestAPeerThatIsGone(t *testing.T) {
	t.Parallel()
	client, service, ended := start(t)
	raw, err := client.SyscallConn()
	require.NoError(t, err)
	require.NoError(t, raw.Control(func(fd uintptr) {
		// A second instead of the minute for which the kernel waits.
		require.NoError(t, unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_LINGER2, 1))
	}))
	require.NoError(t, client.Close())
	_, err = service.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
	_, err = service.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF, "it may still write")
	require.ErrorIs(t, <-ended, errGone)
	_, err = service.Write([]byte("x"))
	require.Error(t, err)
}

// What nobody reads stops its writer.
func TestBackPressure(t *testing.T) {
	t.Parallel()
	client, service, ended := start(t)
	for _, c := range []*net.TCPConn{client, service} {
		require.NoError(t, c.SetWriteBuffer(64<<10))
		require.NoError(t, c.SetReadBuffer(64<<10))
	}
	require.NoError(t, client.SetWriteDeadline(time.Now().Add(2*time.Second)))
	n, err := io.CopyN(client, zeroes{}, 1<<30)
	require.ErrorContains(t, err, "i/o timeout")
	require.Less(t, n, int64(64<<20))
	require.NoError(t, client.CloseWrite())
	got, err := io.Copy(io.Discard, service)
	require.NoError(t, err)
	require.GreaterOrEqual(t, got, n)
	require.NoError(t, service.Close())
	require.NoError(t, <-ended)
}

type zeroes struct{}

func (zeroes) Read(p []byte) (int, error) { return len(p), nil }

// What closes a connection from outside ends the relay.
func TestClosedFromOutside(t *testing.T) {
	t.Parallel()
	client, a := pair(t)
	_, b := pair(t)
	ended := make(chan error, 1)
	go func() { ended <- Run(a, b) }()
	require.NoError(t, b.Close())
	require.ErrorIs(t, <-ended, net.ErrClosed)
	_, err := client.Read(make([]byte, 1))
	require.ErrorIs(t, err, unix.ECONNRESET)
}
