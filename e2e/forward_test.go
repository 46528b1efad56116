// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage/pattern"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
	"github.com/cloudhv/containerd-cloudhv/guest/api/thread"
)

const (
	// Ports of a pod's services, by what these are bound to.
	onV4, onV6, onAnyV4, onAny, onNone = 8001, 8002, 8003, 8004, 8009
	// forwarded is what goes through a port-forward each way.
	forwarded = 2 << 20
	// atOnce is how many connections there are at a time.
	atOnce = 50
)

// forwardPod is a pod whose services are bound to each of localhost's addresses and to
// all addresses.
func forwardPod(t *testing.T, h string) *pod {
	t.Helper()
	p := newPod(t, h)
	p.start(helperConfig("server", "serve", fmt.Sprint("127.0.0.1:", onV4), fmt.Sprint("[::1]:", onV6),
		fmt.Sprint("0.0.0.0:", onAnyV4), strconv.Itoa(onAny))).awaitLine("listening")
	return p
}

// TestPortForward goes through CRI's streaming server, as kubectl does.
func TestPortForward(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := forwardPod(t, h)
		for name, port := range map[string]int{"127.0.0.1": onV4, "::1": onV6, "0.0.0.0": onAnyV4, "::": onAny} {
			t.Run(name, func(t *testing.T) {
				if port == onV6 && h == testnode.RunC && !localhostIPv6() {
					t.Skip("NOT TESTED: the host's localhost has no IPv6 address, by which CRI would look for the service")
				}
				client := p.forwarder(t)
				seed := uint64(time.Now().UnixNano())
				require.NoError(t, pattern.RecvOn(client.connect(t, port), forwarded, seed))
				require.NoError(t, pattern.SendOn(client.connect(t, port), forwarded, seed))
			})
		}
		t.Run("refused", func(t *testing.T) {
			client := p.forwarder(t)
			why := client.connect(t, onNone).failure(t)
			require.Contains(t, why, "failed to execute portforward in network namespace")
			require.Regexp(t, "connection refused|connection reset by peer", why)
			require.NoError(t, pattern.RecvOn(p.forwarder(t).connect(t, onV4), 1, 1), "another one")
		})
		t.Run("at once", func(t *testing.T) {
			client := p.forwarder(t)
			var wg sync.WaitGroup
			errs := make([]error, atOnce)
			for i := range errs {
				c := client.connect(t, []int{onV4, onAnyV4, onAny}[i%3])
				wg.Go(func() { errs[i] = pattern.RecvOn(c, 100_000, uint64(i)) })
			}
			wg.Wait()
			for i, err := range errs {
				require.NoError(t, err, "connection %d of %d", i, atOnce)
			}
		})
		t.Run("another pod", func(t *testing.T) {
			other := forwardPod(t, h)
			for _, p := range []*pod{p, other} {
				require.Contains(t, get(t, p.forwarder(t).connect(t, onV4)), "hello from "+p.cfg.GetHostname()+"\n")
			}
		})
	})
}

// localhostIPv6 tells whether localhost is ::1 too on this host, as CRI dials it by name.
func localhostIPv6() bool {
	_, err := net.ResolveTCPAddr("tcp6", "localhost:1")
	return err == nil
}

// TestPortForwardInNamespace connects in the pod's network namespace, as CRI's server does
// for its clients: only so both directions of a connection can end separately.
func TestPortForwardInNamespace(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := forwardPod(t, h)
		for _, addr := range []string{fmt.Sprint("127.0.0.1:", onV4), fmt.Sprint("[::1]:", onV6), fmt.Sprint("127.0.0.1:", onAnyV4), fmt.Sprint("[::1]:", onAny)} {
			seed := uint64(time.Now().UnixNano())
			require.NoError(t, pattern.SendOn(p.dialInside(t, addr), forwarded, seed), addr)
			require.NoError(t, pattern.RecvOn(p.dialInside(t, addr), forwarded, seed), addr)
		}
		t.Run("refused", func(t *testing.T) {
			conn, err := dialInside(p.netNS(t), fmt.Sprint("127.0.0.1:", onNone))
			if err == nil {
				defer conn.Close()
				_, err = conn.Read(make([]byte, 1))
				require.ErrorIs(t, err, unix.ECONNRESET)
			} else if !errors.Is(err, unix.ECONNRESET) {
				require.ErrorIs(t, err, unix.ECONNREFUSED)
			}
		})
		t.Run("speed", func(t *testing.T) { p.forwardSpeed(t) })
	})
}

// forwardSpeed tells what a port-forward can do, without CRI's own streaming.
func (p *pod) forwardSpeed(t *testing.T) {
	addr := fmt.Sprint("127.0.0.1:", onV4)
	const rounds = 50
	took := make([]time.Duration, rounds)
	for i := range took {
		start := time.Now()
		require.NoError(t, pattern.RecvOn(p.dialInside(t, addr), 1, 1))
		took[i] = time.Since(start)
	}
	slices.Sort(took)
	t.Logf("a connection, a question, an answer of 1 byte and the end: median %s, p90 %s", took[rounds/2], took[rounds*9/10])
	for what, carry := range map[string]func(io.ReadWriter, int64, uint64) error{"from": pattern.RecvOn, "to": pattern.SendOn} {
		start := time.Now()
		require.NoError(t, carry(p.dialInside(t, addr), count.bulk, 1))
		d := time.Since(start)
		t.Logf("%d MiB %s the pod in %s: %.1f MiB/s", count.bulk>>20, what, d.Round(time.Millisecond), float64(count.bulk)/(1<<20)/d.Seconds())
	}
}

// TestPortForwardChurn makes many connections in a row, by few at a time, and the last is
// as good as the first.
func TestPortForwardChurn(t *testing.T) {
	requireCloudHV(t)
	p := forwardPod(t, testnode.CloudHV)
	const parallel, each = 8, 125
	path := p.netNS(t)
	start := time.Now()
	var wg sync.WaitGroup
	errs := make([]error, parallel)
	for i := range errs {
		wg.Go(func() {
			for n := range each {
				conn, err := dialInside(path, fmt.Sprint("127.0.0.1:", []int{onV4, onV6, onAny, onNone}[n%4]))
				if err == nil {
					err = pattern.RecvOn(conn, 1000, uint64(n))
					_ = conn.Close()
				}
				if (err != nil) != (n%4 == 3) {
					errs[i] = fmt.Errorf("connection %d: %w", n, err)
					return
				}
			}
		})
	}
	wg.Wait()
	require.NoError(t, errors.Join(errs...))
	t.Logf("%d connections, of which a quarter was refused, in %s", parallel*each, time.Since(start).Round(time.Millisecond))
	require.NoError(t, pattern.SendOn(p.dialInside(t, fmt.Sprint("127.0.0.1:", onV4)), forwarded, 1))
}

// TestPortForwardRestart has containerd end while a connection is open, which CRI does not
// carry: it goes on, and new ones are made as before.
func TestPortForwardRestart(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		for name, kill := range map[string]bool{"stop": false, "kill": true} {
			t.Run(name, func(t *testing.T) {
				p := forwardPod(t, h)
				open := p.dialInside(t, fmt.Sprint("127.0.0.1:", onV4))
				through := p.forwarder(t).connect(t, onAny)
				require.NoError(t, p.n.Restart(testContext(t), kill))
				require.NoError(t, pattern.SendOn(open, forwarded, 5), "the connection that was open")
				_, err := io.Copy(io.Discard, through)
				t.Logf("the client of CRI's server: %v", err)
				require.NoError(t, pattern.RecvOn(p.forwarder(t).connect(t, onAny), forwarded, 6))
			})
		}
	})
}

// forwarder is a client of CRI's port-forwards to a pod.
type forwarder struct {
	httpstream.Connection
	next atomic.Int64
}

func (p *pod) forwarder(t *testing.T) *forwarder {
	t.Helper()
	r, err := p.n.Runtime().PortForward(testContext(t), &runtimeapi.PortForwardRequest{PodSandboxId: p.id})
	require.NoError(t, err)
	u, err := url.Parse(r.GetUrl())
	require.NoError(t, err)
	transport, upgrader, err := spdy.RoundTripperFor(&rest.Config{})
	require.NoError(t, err)
	conn, _, err := spdy.NewDialerForStreaming(upgrader, &http.Client{Transport: transport}, "POST", u).Dial(portforward.PortForwardProtocolV1Name)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return &forwarder{Connection: conn}
}

// stream is a connection through a forwarder: its data, and what CRI says of it.
type stream struct {
	httpstream.Stream
	err httpstream.Stream
}

// open connects to a port; it may be called from everywhere at once.
func (f *forwarder) open(port int) (stream, error) {
	headers := http.Header{}
	headers.Set(corev1.PortHeader, strconv.Itoa(port))
	headers.Set(corev1.PortForwardRequestIDHeader, strconv.FormatInt(f.next.Add(1), 10))
	headers.Set(corev1.StreamType, corev1.StreamTypeError)
	errs, err := f.CreateStream(headers)
	if err != nil {
		return stream{}, err
	}
	if err := errs.Close(); err != nil { // nothing is sent on it
		return stream{}, err
	}
	headers.Set(corev1.StreamType, corev1.StreamTypeData)
	data, err := f.CreateStream(headers)
	return stream{data, errs}, err
}

func (f *forwarder) connect(t *testing.T, port int) stream {
	t.Helper()
	s, err := f.open(port)
	require.NoError(t, err)
	return s
}

// failure is what CRI says of a connection that has failed.
func (s stream) failure(t *testing.T) string {
	t.Helper()
	text, err := io.ReadAll(s.err)
	require.NoError(t, err)
	require.NotEmpty(t, text, "it did not fail")
	return string(text)
}

// get asks for a page by HTTP.
func get(t *testing.T, conn io.ReadWriter) string {
	t.Helper()
	_, err := io.WriteString(conn, "GET / HTTP/1.0\r\n\r\n")
	require.NoError(t, err)
	answer, err := io.ReadAll(conn)
	require.NoError(t, err)
	return string(answer)
}

// dialInside connects in the pod's network namespace on the host.
func (p *pod) dialInside(t *testing.T, addr string) *net.TCPConn {
	t.Helper()
	conn, err := dialInside(p.netNS(t), addr)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func dialInside(path, addr string) (conn *net.TCPConn, _ error) {
	err := thread.Run(func() error {
		if err := enterNetNS(path); err != nil {
			return err
		}
		dialer := net.Dialer{Timeout: testnode.Scale(30 * time.Second)}
		c, err := dialer.Dial("tcp", addr)
		if err == nil {
			conn = c.(*net.TCPConn)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return conn, conn.SetDeadline(time.Now().Add(testnode.Scale(testLimit)))
}

// enterNetNS brings the thread into a network namespace.
func enterNetNS(path string) error {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return err
	}
	return errors.Join(netns.Set(ns), ns.Close())
}

// netNS is the path of the pod's network namespace on the host.
func (p *pod) netNS(t *testing.T) string {
	t.Helper()
	st, err := p.n.Runtime().PodSandboxStatus(testContext(t), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
	require.NoError(t, err)
	if strings.HasPrefix(p.handler, testnode.CloudHV) {
		var rec struct{ NetNS string }
		b, err := os.ReadFile(filepath.Join(p.n.StateDir(), p.id, "record.json"))
		require.NoError(t, err)
		require.NoError(t, json.Unmarshal(b, &rec))
		return rec.NetNS
	}
	var info struct{ Pid int }
	require.NoError(t, json.Unmarshal([]byte(st.GetInfo()["info"]), &info))
	return fmt.Sprintf("/proc/%d/ns/net", info.Pid)
}
