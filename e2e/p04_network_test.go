// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"net"
	"net/netip"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testimage/pattern"
)

const port = "8000"

// TestNetwork is point 4.
func TestNetwork(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		a, b := newPod(t, h), newPod(t, h)
		inA, inB := a.idle("beside"), b.idle("beside")
		a.start(helperConfig("server", "serve", port)).awaitLine("listening")
		_, _, code, err := b.n.ExecSync(testContext(t), inB.id, testimage.HelperPath, "recv", "127.0.0.1:"+port, "1", "1")
		require.NoError(t, err)
		require.NotZero(t, code, "another pod has another localhost")
		b.start(helperConfig("server", "serve", port)).awaitLine("listening")
		for i, family := range []string{"IPv4", "IPv6"} {
			t.Run(family, func(t *testing.T) {
				localhost, large := []string{"127.0.0.1", "::1"}[i], []int64{count.bulk, count.bulk6}[i]
				hosts := a.n.HostIPs()
				if i >= len(hosts) {
					t.Skip("NOT TESTED: this host has no " + family)
				}
				ipA, ipB := a.ips()[i], b.ips()[i]
				host := hostServer(t, hosts[i])
				inA.transfer(t, "container to container", net.JoinHostPort(localhost, port), count.smaller)
				inB.transfer(t, "pod to pod", net.JoinHostPort(ipA, port), large)
				inA.transfer(t, "pod to pod, back", net.JoinHostPort(ipB, port), count.smaller)
				inA.transfer(t, "pod to host", host, large)
				inB.transfer(t, "the other pod to host", host, count.smaller)
				hostTransfer(t, "host to pod", net.JoinHostPort(ipA, port), large)
				hostTransfer(t, "host to the other pod", net.JoinHostPort(ipB, port), count.smaller)
			})
		}
	})
}

// transfer has the container get so many bytes from a server and send it as many;
// their checksums must be right.
func (c *container) transfer(t *testing.T, what, addr string, size int64) {
	t.Helper()
	p := *c.pod
	p.t = t
	own := container{pod: &p, id: c.id}
	start := time.Now()
	for _, verb := range []string{"recv", "send"} {
		own.exec(testimage.HelperPath, verb, addr, strconv.FormatInt(size, 10), strconv.Itoa(start.Nanosecond()))
	}
	logTransfer(t, what, size, start)
}

// hostTransfer does the same from the host.
func hostTransfer(t *testing.T, what, addr string, size int64) {
	t.Helper()
	start := time.Now()
	require.NoError(t, pattern.Recv(addr, size, uint64(start.Nanosecond())), what)
	require.NoError(t, pattern.Send(addr, size, uint64(start.Nanosecond())+1), what)
	logTransfer(t, what, size, start)
}

func logTransfer(t *testing.T, what string, size int64, start time.Time) {
	t.Helper()
	t.Logf("%s: %d KiB each way in %s", what, size>>10, time.Since(start).Round(time.Millisecond))
}

// hostServer serves on one of the host's addresses until the test ends.
func hostServer(t *testing.T, ip netip.Addr) string {
	t.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: ip.AsSlice()})
	require.NoError(t, err)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		// It ends when the listener is closed; what a client makes of it, the client tells.
		_ = pattern.Serve(l, "hello from the host\n", func(error) {})
	}()
	t.Cleanup(func() {
		l.Close()
		<-ended
	})
	return l.Addr().String()
}
