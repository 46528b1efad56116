// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package network

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/nftables"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// forwardFrom makes the listeners in a namespace, for as long as the test.
func forwardFrom(t *testing.T, ns *netNS) (listeners []*net.TCPListener) {
	t.Helper()
	f, err := Listen(t.Context(), ns.path)
	require.NoError(t, err)
	require.Len(t, f.Listeners, 2, "one for each family")
	for _, file := range f.Listeners {
		l, err := net.FileListener(file)
		require.NoError(t, err)
		t.Cleanup(func() { _ = l.Close() })
		listeners = append(listeners, l.(*net.TCPListener))
	}
	require.NoError(t, f.Close())
	require.NoError(t, f.Close())
	return listeners
}

// dialIn connects from within a namespace.
func dialIn(t *testing.T, ns *netNS, addr string, local *net.TCPAddr) (net.Conn, error) {
	t.Helper()
	var conn net.Conn
	err := inNetNS(ns.NsHandle, func() (err error) {
		dialer := net.Dialer{Timeout: 5 * time.Second, Control: reuse}
		if local != nil {
			dialer.LocalAddr = local
		}
		conn, err = dialer.DialContext(t.Context(), "tcp", addr)
		return err
	})
	if err == nil {
		t.Cleanup(func() { _ = conn.Close() })
	}
	return conn, err
}

// accepted takes the connection that conn is the other end of, and tells which port it
// was made to.
func accepted(t *testing.T, l *net.TCPListener) (net.Conn, int) {
	t.Helper()
	require.NoError(t, l.SetDeadline(time.Now().Add(10*time.Second)))
	conn, err := l.AcceptTCP()
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	raw, err := conn.SyscallConn()
	require.NoError(t, err)
	port := 0
	require.NoError(t, raw.Control(func(fd uintptr) {
		const soOriginalDst = 80
		if conn.LocalAddr().(*net.TCPAddr).IP.To4() != nil {
			dst, err := unix.GetsockoptIPv6Mreq(int(fd), unix.IPPROTO_IP, soOriginalDst)
			require.NoError(t, err)
			port = int(binary.BigEndian.Uint16(dst.Multiaddr[2:]))
			return
		}
		dst, err := unix.GetsockoptIPv6MTUInfo(int(fd), unix.IPPROTO_IPV6, soOriginalDst)
		require.NoError(t, err)
		port = int(binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, dst.Addr.Port)))
	}))
	return conn, port
}

// said checks that what one end says arrives at the other.
func said(t *testing.T, from, to net.Conn, text string) {
	t.Helper()
	_, err := from.Write([]byte(text))
	require.NoError(t, err)
	require.NoError(t, to.SetReadDeadline(time.Now().Add(10*time.Second)))
	buf := make([]byte, 64)
	n, err := to.Read(buf)
	require.NoError(t, err)
	require.Equal(t, text, string(buf[:n]))
}

// Every connection to localhost comes to a listener of its family, which is told the port.
func TestForwardTakesEveryPort(t *testing.T) {
	pod := newNetNS(t)
	listeners := forwardFrom(t, pod)
	own := listeners[0].Addr().(*net.TCPAddr).Port
	for _, tc := range []struct {
		host   string
		family int
	}{{"127.0.0.1", 0}, {"127.1.2.3", 0}, {"::1", 1}} {
		for _, port := range []int{1, 80, 443, 8080, 65535, own} {
			conn, err := dialIn(t, pod, net.JoinHostPort(tc.host, fmt.Sprint(port)), nil)
			require.NoError(t, err, "%s %d", tc.host, port)
			far, dialled := accepted(t, listeners[tc.family])
			require.Equal(t, port, dialled, tc.host)
			said(t, conn, far, "there")
			said(t, far, conn, "and back")
		}
	}
}

// Connections from one port to several are different before the redirection, and the
// same after it.
func TestForwardsFromOnePort(t *testing.T) {
	pod := newNetNS(t)
	listeners := forwardFrom(t, pod)
	for i, host := range []string{"127.0.0.1", "::1"} {
		local := &net.TCPAddr{IP: net.ParseIP(host), Port: 12345}
		var near, far [3]net.Conn
		for n := range near {
			var err error
			near[n], err = dialIn(t, pod, net.JoinHostPort(host, fmt.Sprint(8000+n)), local)
			require.NoError(t, err)
			var port int
			far[n], port = accepted(t, listeners[i])
			require.Equal(t, 8000+n, port)
		}
		for n := range near {
			said(t, near[n], far[n], fmt.Sprint("to ", n))
			said(t, far[n], near[n], fmt.Sprint("from ", n))
		}
	}
}

// What is not for localhost goes its way, and nobody outside reaches the listeners.
func TestForwardIsForTheNamespaceOnly(t *testing.T) {
	pod, outside := podNetwork(t)
	listeners := forwardFrom(t, pod)
	var server net.Listener
	require.NoError(t, inNetNS(outside.NsHandle, func() (err error) {
		server, err = net.Listen("tcp", "10.88.0.1:8080")
		return err
	}))
	defer server.Close()
	conn, err := dialIn(t, pod, "10.88.0.1:8080", nil)
	require.NoError(t, err, "from the namespace to outside")
	far, err := server.Accept()
	require.NoError(t, err)
	defer far.Close()
	said(t, conn, far, "out")

	port := fmt.Sprint(listeners[0].Addr().(*net.TCPAddr).Port)
	for _, host := range []string{"10.88.0.5", "fd00:88::5"} {
		for _, port := range []string{port, "80"} {
			_, err = dialIn(t, outside, net.JoinHostPort(host, port), nil)
			require.ErrorIs(t, err, unix.ECONNREFUSED, "from outside to %s %s", host, port)
			_, err = dialIn(t, pod, net.JoinHostPort(host, port), nil)
			require.ErrorIs(t, err, unix.ECONNREFUSED, "from the namespace to its own address %s %s", host, port)
		}
	}
	_, err = dialIn(t, outside, "127.0.0.1:"+port, nil)
	require.ErrorIs(t, err, unix.ECONNREFUSED, "another namespace has another localhost")
}

// Listening again replaces what was there, and Clear removes it, any number of times.
func TestClearRemovesTheRedirection(t *testing.T) {
	pod, _ := podNetwork(t)
	tables := func() int {
		conn, err := nftables.New(nftables.WithNetNSFd(int(pod.NsHandle)))
		require.NoError(t, err)
		all, err := conn.ListTables()
		require.NoError(t, err)
		return len(all)
	}
	require.NoError(t, Clear(t.Context(), pod.path))
	forwardFrom(t, pod)
	listeners := forwardFrom(t, pod)
	require.Equal(t, 1, tables())
	_, err := dialIn(t, pod, "127.0.0.1:80", nil)
	require.NoError(t, err)
	_, port := accepted(t, listeners[0])
	require.Equal(t, 80, port)

	require.NoError(t, Disconnect(t.Context(), pod.path))
	require.Equal(t, 1, tables())
	for range 2 {
		require.NoError(t, Clear(t.Context(), pod.path))
		require.Zero(t, tables())
	}
	_, err = dialIn(t, pod, "127.0.0.1:80", nil)
	require.ErrorIs(t, err, unix.ECONNREFUSED)
}

// A redirection without a listener refuses, as a pod does that has ended.
func TestForwardWithoutListeners(t *testing.T) {
	pod := newNetNS(t)
	f, err := Listen(t.Context(), pod.path)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	for _, addr := range []string{"127.0.0.1:80", "[::1]:80"} {
		_, err = dialIn(t, pod, addr, nil)
		require.ErrorIs(t, err, unix.ECONNREFUSED, addr)
	}
}

// Loopback may come up after the listeners.
func TestForwardBeforeLoopbackIsUp(t *testing.T) {
	pod := newNetNS(t)
	lo, err := pod.LinkByName("lo")
	require.NoError(t, err)
	require.NoError(t, pod.LinkSetDown(lo))
	listeners := forwardFrom(t, pod)
	require.NoError(t, pod.LinkSetUp(lo))
	for i, host := range []string{"127.0.0.1", "::1"} {
		_, err := dialIn(t, pod, net.JoinHostPort(host, "80"), nil)
		require.NoError(t, err)
		_, port := accepted(t, listeners[i])
		require.Equal(t, 80, port)
	}
}

func TestListenRefuses(t *testing.T) {
	newNetNS(t) // skips without root
	_, err := Listen(t.Context(), "/proc/thread-self/ns/net")
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, "/proc/thread-self/ns/net is the host's")
	_, err = Listen(t.Context(), filepath.Join(t.TempDir(), "gone"))
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	plain := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(plain, nil, 0o600))
	_, err = Listen(t.Context(), plain)
	require.ErrorIs(t, err, errdefs.ErrNotFound, "what was left of a namespace")
}

// reuse lets connections have the same port.
func reuse(_, _ string, c syscall.RawConn) error {
	var err error
	if cerr := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}); cerr != nil {
		return cerr
	}
	return err
}

// What a pod's start pays for its port-forwards is told by -v.
func TestListenTakesLittle(t *testing.T) {
	var took []time.Duration
	for range 20 {
		pod := newNetNS(t)
		began := time.Now()
		f, err := Listen(t.Context(), pod.path)
		took = append(took, time.Since(began))
		require.NoError(t, err)
		require.NoError(t, f.Close())
	}
	slices.Sort(took)
	t.Logf("listening and redirecting in a new namespace: median %s, at most %s", took[len(took)/2], took[len(took)-1])
}
