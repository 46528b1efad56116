// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/controller/network"
	"github.com/cloudhv/containerd-cloudhv/guest/api"
)

// forwards are the port-forwards of a pod: a network namespace, and what the guest does.
type forwards struct {
	*pod
	do func(func() error) error // in the namespace
}

// newForwards makes a pod whose guest serves port-forwards by answer, which has read the
// port.
func newForwards(t *testing.T, answer func(conn net.Conn, port uint16), change ...func(*forwarder)) *forwards {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make a network namespace")
	}
	f := &forwards{pod: newPod(t)}
	f.guest.forward.Store(&answer)
	calls := make(chan func())
	ready := make(chan error)
	go func() {
		// The thread ends with this goroutine, and the namespace with it.
		runtime.LockOSThread()
		_, err := netns.New()
		if err == nil {
			var lo netlink.Link
			if lo, err = netlink.LinkByName("lo"); err == nil {
				err = netlink.LinkSetUp(lo)
			}
		}
		ready <- err
		for call := range calls {
			call()
		}
	}()
	require.NoError(t, <-ready)
	t.Cleanup(func() { close(calls) })
	f.do = func(g func() error) error {
		done := make(chan error)
		calls <- func() { done <- g() }
		return <-done
	}
	var path string
	require.NoError(t, f.do(func() error {
		path = fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
		return nil
	}))
	forward, err := network.Listen(t.Context(), path)
	require.NoError(t, err)
	var listeners []*net.TCPListener
	for _, file := range forward.Listeners {
		l, err := net.FileListener(file)
		require.NoError(t, err)
		listeners = append(listeners, l.(*net.TCPListener))
	}
	require.NoError(t, forward.Close())
	for _, c := range change {
		c(f.svc.forwards)
	}
	f.svc.forwards.serve(listeners)
	return f
}

// dial connects as CRI does.
func (f *forwards) dial(addr string) *net.TCPConn {
	f.t.Helper()
	conn, err := f.tryDial(addr)
	require.NoError(f.t, err)
	require.NoError(f.t, conn.SetDeadline(time.Now().Add(time.Minute)))
	f.t.Cleanup(func() { _ = conn.Close() })
	return conn.(*net.TCPConn)
}

func (f *forwards) tryDial(addr string) (conn net.Conn, err error) {
	err = f.do(func() (err error) {
		dialer := net.Dialer{Timeout: 20 * time.Second}
		conn, err = dialer.DialContext(context.Background(), "tcp", addr)
		return err
	})
	return conn, err
}

// dialReset requires that a connection is reset, perhaps before who makes it can look.
func (f *forwards) dialReset(addr string) {
	f.t.Helper()
	conn, err := f.tryDial(addr)
	if err != nil {
		require.ErrorIs(f.t, err, unix.ECONNRESET)
		return
	}
	defer conn.Close()
	require.NoError(f.t, conn.SetDeadline(time.Now().Add(time.Minute)))
	f.reset(conn)
}

// reset requires that a connection was reset, and not ended.
func (f *forwards) reset(conn net.Conn) {
	f.t.Helper()
	_, err := conn.Read(make([]byte, 1))
	require.ErrorIs(f.t, err, unix.ECONNRESET)
}

// echo is a service of the guest that tells its port and sends back what it gets.
func echo(conn net.Conn, port uint16) {
	_, _ = conn.Write([]byte{api.ForwardAccepted})
	_, _ = conn.Write(binary.BigEndian.AppendUint16(nil, port))
	_, _ = io.Copy(conn, conn)
	_ = conn.Close()
}

// Each connection gets to the port that it was made to, in either family, and each
// direction has an end of its own.
func TestForward(t *testing.T) {
	t.Parallel()
	f := newForwards(t, echo)
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<17)
	for i, host := range []string{"127.0.0.1", "::1", "127.9.9.9"} {
		port := 8000 + i
		conn := f.dial(net.JoinHostPort(host, fmt.Sprint(port)))
		go func() {
			_, _ = conn.Write(data)
			_ = conn.CloseWrite()
		}()
		got, err := io.ReadAll(conn)
		require.NoError(t, err)
		require.Equal(t, port, int(binary.BigEndian.Uint16(got)))
		require.True(t, bytes.Equal(data, got[2:]))
	}
}

func TestManyForwards(t *testing.T) {
	t.Parallel()
	f := newForwards(t, echo)
	var wg sync.WaitGroup
	for i := range 200 {
		port := 1000 + i
		conn := f.dial(fmt.Sprint("127.0.0.1:", port))
		wg.Go(func() {
			_, err := conn.Write([]byte("hello"))
			assert.NoError(t, err)
			assert.NoError(t, conn.CloseWrite())
			got, err := io.ReadAll(conn)
			assert.NoError(t, err)
			assert.Equal(t, append(binary.BigEndian.AppendUint16(nil, uint16(port)), "hello"...), got)
		})
	}
	wg.Wait()
	eventually(t, "places are given back", func() bool { return len(f.svc.forwards.slots) == 0 && len(f.svc.forwards.dials) == 0 })
}

// What the guest does not accept is reset, whatever it says instead, or does not say.
func TestForwardIsReset(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]func(net.Conn, uint16){
		"refused":  func(c net.Conn, _ uint16) { _, _ = c.Write([]byte{api.ForwardRefused}); _ = c.Close() },
		"busy":     func(c net.Conn, _ uint16) { _, _ = c.Write([]byte{api.ForwardBusy}); _ = c.Close() },
		"failed":   func(c net.Conn, _ uint16) { _, _ = c.Write([]byte{api.ForwardFailed}); _ = c.Close() },
		"nonsense": func(c net.Conn, _ uint16) { _, _ = c.Write(bytes.Repeat([]byte{0}, 100)) },
		"nothing":  func(c net.Conn, _ uint16) { _ = c.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newForwards(t, answer)
			f.dialReset("127.0.0.1:80")
			f.dialReset("[::1]:80")
			eventually(t, "places are given back", func() bool { return len(f.svc.forwards.slots) == 0 })
		})
	}
}

// A guest that does not answer holds no more than its own port-forwards, and not other
// streams.
func TestForwardsThatWait(t *testing.T) {
	t.Parallel()
	f := newForwards(t, func(net.Conn, uint16) {})
	var conns []net.Conn
	for range maxForwardDials + 8 {
		conns = append(conns, f.dial("127.0.0.1:80"))
	}
	eventually(t, "all places to wait are taken", func() bool { return len(f.svc.forwards.dials) == maxForwardDials })
	s := f.stdio("c", true)
	f.run("c", s, "cat")
	require.NoError(t, s.in.Close())
	f.guest.die()
	for _, conn := range conns {
		f.reset(conn)
	}
}

// More connections than there may be are reset at once, and those that are there go on.
func TestTooManyForwards(t *testing.T) {
	t.Parallel()
	f := newForwards(t, echo, func(f *forwarder) { f.slots = make(chan struct{}, 2) })
	held := []*net.TCPConn{f.dial("127.0.0.1:80"), f.dial("[::1]:80")}
	eventually(t, "both are carried", func() bool { return len(f.svc.forwards.slots) == 2 })
	f.dialReset("127.0.0.1:80")
	for _, conn := range held {
		require.NoError(t, conn.CloseWrite())
		got, err := io.ReadAll(conn)
		require.NoError(t, err)
		require.Len(t, got, 2)
	}
	eventually(t, "places are given back", func() bool { return len(f.svc.forwards.slots) == 0 })
	require.NoError(t, f.dial("127.0.0.1:80").CloseWrite())
}

// A client that does not read what the guest sends holds nothing either.
func TestForwardsEndWithAClientThatStalls(t *testing.T) {
	t.Parallel()
	f := newForwards(t, func(conn net.Conn, _ uint16) {
		_, _ = conn.Write([]byte{api.ForwardAccepted})
		_ = writePattern(conn, 1<<30)
	})
	conn := f.dial("127.0.0.1:80")
	_, err := io.ReadFull(conn, make([]byte, 1000))
	require.NoError(t, err)
	time.Sleep(200 * time.Millisecond) // until all is full
	f.guest.die()
	eventually(t, "it is carried no more", func() bool { return len(f.svc.forwards.slots) == 0 })
	_, err = io.Copy(io.Discard, conn)
	require.ErrorIs(t, err, unix.ECONNRESET)
}

// With the VM all of it goes, at once: the pod's namespace would stay for a listener.
func TestForwardsEndWithTheVM(t *testing.T) {
	t.Parallel()
	f := newForwards(t, echo)
	conn := f.dial("127.0.0.1:80")
	_, err := io.ReadFull(conn, make([]byte, 2))
	require.NoError(t, err)
	f.guest.die()
	f.reset(conn)
	eventually(t, "nobody listens", func() bool {
		return f.do(func() error {
			c, err := net.Dial("tcp", "127.0.0.1:80")
			if err == nil {
				_ = c.Close()
			}
			return err
		}) != nil
	})
}
