// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"net"
	"net/netip"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testimage/pattern"
)

const (
	// bulk is what goes over TCP each way, smaller what goes over the other paths.
	bulk    = 100 << 20
	smaller = 4 << 20
	port    = "8000"
)

// TestNetwork is point 4.
func TestNetwork(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		a, b := newPod(t, h), newPod(t, h)
		server := a.start(helperConfig("server", "serve", port))
		server.awaitLine("listening")
		beside, other := a.idle("beside"), b.idle("other")

		t.Run("localhost", func(t *testing.T) {
			for _, ip := range []string{"127.0.0.1", "::1"} {
				beside.exec(testimage.HelperPath, "recv", net.JoinHostPort(ip, port), strconv.Itoa(smaller), "1")
				beside.exec(testimage.HelperPath, "send", net.JoinHostPort(ip, port), strconv.Itoa(smaller), "2")
			}
			_, _, code, err := other.n.ExecSync(testContext(t), other.id, testimage.HelperPath, "recv", net.JoinHostPort("127.0.0.1", port), "1", "1")
			require.NoError(t, err)
			require.NotZero(t, code, "another pod has another localhost")
		})
		t.Run("host to pod", func(t *testing.T) {
			size := int64(bulk)
			for _, ip := range a.ips() {
				require.NoError(t, pattern.Recv(net.JoinHostPort(ip, port), size, 3))
				require.NoError(t, pattern.Send(net.JoinHostPort(ip, port), size, 4))
				size = smaller // the second time, over IPv6
			}
		})
		t.Run("pod to pod", func(t *testing.T) {
			size := bulk / 4
			for _, ip := range a.ips() {
				other.exec(testimage.HelperPath, "recv", net.JoinHostPort(ip, port), strconv.Itoa(size), "5")
				other.exec(testimage.HelperPath, "send", net.JoinHostPort(ip, port), strconv.Itoa(size), "6")
				size = smaller
			}
		})
		t.Run("pod to host", func(t *testing.T) {
			for _, ip := range a.n.HostIPs() {
				addr := hostServer(t, ip)
				beside.exec(testimage.HelperPath, "recv", addr, strconv.Itoa(bulk/4), "7")
				beside.exec(testimage.HelperPath, "send", addr, strconv.Itoa(smaller), "8")
			}
		})
	})
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
