// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testimage/pattern"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// hostPort is one of the host's, which leads to a pod's port.
const hostPort = 31999

// networkBridges runs a pod on each of two bridges, with frames of the usual size and
// jumbo frames, between which the host routes.
func networkBridges(l lab) {
	families := route(l)
	a := l.server("lan", func(cfg *runtimeapi.PodSandboxConfig) {
		n, err := strconv.Atoi(port)
		require.NoError(l, err)
		cfg.PortMappings = []*runtimeapi.PortMapping{{Protocol: runtimeapi.Protocol_TCP, ContainerPort: int32(n), HostPort: hostPort}}
	})
	b := l.server("jumbo")
	l.Run("Routed", func(t *testing.T) {
		for i := range families {
			a.transfer(t, "pod to pod", serverAt(b.ips()[i]), aFew)
			b.transfer(t, "pod to pod, back", serverAt(a.ips()[i]), aFew)
		}
		// The host tells the sender that the next bridge has smaller frames.
		small, large := l.n.LANs()[0].MTU, l.n.LANs()[1].MTU
		want := fmt.Sprintf("%d is too large\n%d passes\n%d is too large\n", large, small, small+1)
		require.Equal(t, want, b.probe(a.ips()[0], large, small, small+1))
	})
	l.Run("MTU", func(t *testing.T) {
		for k, c := range []*container{a, b} {
			requireMTU(t, c, l.n.LANs()[k])
		}
	})
	l.Run("Offloads", func(t *testing.T) {
		for _, c := range []*container{a, b} {
			requireOffloads(t, c)
		}
	})
	l.Run("HostPort", func(t *testing.T) {
		for k, lan := range l.n.LANs() {
			at := fmt.Sprintf("%s:%d", lan.HostIPs()[0], hostPort)
			hostTransfer(t, "host to host port", at, aFew)
			b.transfer(t, fmt.Sprintf("pod to host port, on bridge %d", k), at, aFew)
		}
	})
}

// route has the host route between the node's LANs, which ends with these, and returns
// for how many families it does.
func route(l lab) int {
	families := len(l.n.HostIPs())
	for _, lan := range l.n.LANs() {
		require.NoError(l, os.WriteFile("/proc/sys/net/ipv4/conf/"+lan.Bridge+"/forwarding", []byte("1"), 0o644))
		if families < 2 {
			continue
		}
		// Older kernels have one switch for all interfaces, which is the host's.
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+lan.Bridge+"/force_forwarding", []byte("1"), 0o644); err != nil {
			l.Logf("NOT TESTED: IPv6 between two bridges: %v", err)
			families = 1
		}
	}
	return families
}

// requireMTU checks that packets of the LAN's MTU pass in one piece, and larger ones do
// not, in both directions and families.
func requireMTU(t *testing.T, c *container, lan testnode.LAN) {
	t.Helper()
	require.Equal(t, strconv.Itoa(lan.MTU), strings.TrimSpace(c.sh("cat /sys/class/net/eth0/mtu")))
	want := fmt.Sprintf("%d passes\n%d is too large\n", lan.MTU, lan.MTU+1)
	for i, ip := range lan.HostIPs() {
		hostEcho(t, ip)
		require.Equal(t, want, c.probe(ip.String(), lan.MTU, lan.MTU+1))
		require.NoError(t, hostProbe(t, c.ips()[i], lan.MTU))
		require.ErrorIs(t, hostProbe(t, c.ips()[i], lan.MTU+1), pattern.ErrTooLarge)
	}
}

// requireOffloads checks that the kernel leaves checksums and the cutting into packets
// to the device: that it says so, and that it hands it more than a packet at a time.
func requireOffloads(t *testing.T, c *container) {
	t.Helper()
	on := c.exec(testimage.HelperPath, "offloads", "eth0")
	for _, o := range []string{"rx-checksum", "tx-checksum", "scatter-gather", "tcp-segmentation", "generic-segmentation"} {
		require.Equal(t, "on", field(on, o), on)
	}
	counters := func() (n [4]int64) {
		_, err := fmt.Sscan(c.sh("cd /sys/class/net/eth0/statistics && cat rx_bytes rx_packets tx_bytes tx_packets"), &n[0], &n[1], &n[2], &n[3])
		require.NoError(t, err)
		return n
	}
	mtu, err := strconv.ParseInt(strings.TrimSpace(c.sh("cat /sys/class/net/eth0/mtu")), 10, 64)
	require.NoError(t, err)
	const size = 8 << 20
	before := counters()
	require.NoError(t, pattern.Send(serverAt(c.ips()[0]), size, 1))
	between := counters()
	require.NoError(t, pattern.Recv(serverAt(c.ips()[0]), size, 2))
	after := counters()
	in := (between[0] - before[0]) / (between[1] - before[1])
	out := (after[2] - between[2]) / (after[3] - between[3])
	t.Logf("MTU %d: packets of %d bytes in and %d bytes out, on the average", mtu, in, out)
	require.Greater(t, in, mtu)
	require.Greater(t, out, mtu)
}
