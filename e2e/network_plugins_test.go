// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"net"
	"os"
	"strings"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage/pattern"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// networkBandwidth limits a pod's traffic by the plugin bandwidth, which does it on the
// host's side of CNI's pair of devices: the limits hold in both directions.
func networkBandwidth(l lab) {
	ifb := &netlink.Ifb{LinkAttrs: netlink.LinkAttrs{Name: "chvifb"}}
	if err := netlink.LinkAdd(ifb); err != nil {
		l.Skipf("NOT TESTED: the plugin needs devices that the host's kernel does not have: ifb: %v", err)
	}
	require.NoError(l, netlink.LinkDel(ifb))
	c := l.server("slow")
	addr := serverAt(c.ips()[0])
	const size = 2 << 20
	for _, way := range []struct {
		name string
		rate float64
		run  func() error
	}{
		{"into the pod", ingressRate, func() error { return pattern.Send(addr, size, 1) }},
		{"out of the pod", egressRate, func() error { return pattern.Recv(addr, size, 2) }},
	} {
		began := time.Now()
		require.NoError(l, way.run())
		took := time.Since(began)
		// What passes at once takes no time; headers and acknowledgements some.
		least := time.Duration((size*8 - burst) / way.rate * float64(time.Second))
		l.Logf("%s: %d MiB in %s, at %.0f Mbit/s at least %s", way.name, size>>20, took.Round(time.Millisecond), way.rate/1e6, least.Round(time.Millisecond))
		require.Greater(l, took, least*95/100, "%s: the limit does not hold", way.name)
		require.Less(l, took, least*3/2+testnode.Scale(time.Second), "%s: it is slower than the limit", way.name)
	}
}

// networkFirewall has the plugin firewall keep pods on different bridges apart.
func networkFirewall(l lab) {
	route(l)
	a, neighbour, other := l.server("fwa"), l.server("fwa"), l.server("fwb")
	l.Cleanup(func() {
		for _, c := range []*container{a, neighbour, other} {
			c.remove()
		}
		require.NoError(l, l.n.RemoveChains())
	})
	a.reach("pod to a pod on the same bridge", neighbour.ips()[0])
	hostTransfer(l.T, "host to pod", serverAt(a.ips()[0]), aFew)
	hostTransfer(l.T, "host to the other pod", serverAt(other.ips()[0]), aFew)
	a.refused(other.ips()[0])
	other.refused(a.ips()[0])
}

// networkFailedAdd runs a pod whose CNI plugin fails: the error says why, nothing is
// left, and the next pod runs.
func networkFailedAdd(l lab) {
	l.setScript("ADD", "echo no network today; exit 1")
	before, err := settled(testContext(l.T), l.n)
	require.NoError(l, err)
	cfg := l.n.PodConfig("fails")
	_, err = l.n.RunPod(testContext(l.T), cfg, l.handler("script"))
	require.ErrorContains(l, err, "no network today")
	l.Log(err)
	list, err := l.n.Runtime().ListPodSandbox(testContext(l.T), &runtimeapi.ListPodSandboxRequest{})
	require.NoError(l, err)
	require.Empty(l, list.GetItems())
	require.NoError(l, l.n.AwaitCensus(testContext(l.T), before))
	l.setScript("ADD", "")
	l.server("script")
}

// networkFailedDelete has a CNI plugin fail when a pod is stopped: the error says why,
// and it is done when it is asked for again.
func networkFailedDelete(l lab) {
	l.setScript("DEL", "echo not yet; exit 1")
	before, err := settled(testContext(l.T), l.n)
	require.NoError(l, err)
	c := l.server("script")
	ip := c.ips()[0]
	for range 2 {
		require.ErrorContains(l, l.n.StopPod(testContext(l.T), c.pod.id), "not yet")
	}
	require.Equal(l, runtimeapi.PodSandboxState_SANDBOX_NOTREADY, c.state())
	_, err = net.DialTimeout("tcp", serverAt(ip), time.Second)
	require.Error(l, err, "it is stopped")
	l.setScript("DEL", "")
	c.remove()
	require.NoError(l, l.n.AwaitCensus(testContext(l.T), before))
}

// networkDNS compares what pods of many DNS configurations have with what they ask for,
// and without one with the host's.
func networkDNS(l lab) {
	many := strings.Fields("192.0.2.1 2001:db8::1 192.0.2.3")
	for _, tc := range []struct {
		name string
		dns  *runtimeapi.DNSConfig
		want string
	}{
		{"all", &runtimeapi.DNSConfig{Servers: many, Searches: []string{"a.chv.test", "chv.test"}, Options: []string{"ndots:5", "edns0", "single-request"}},
			"search a.chv.test chv.test\nnameserver 192.0.2.1\nnameserver 2001:db8::1\nnameserver 192.0.2.3\noptions ndots:5 edns0 single-request\n"},
		{"none", nil, hostFile(l, "/etc/resolv.conf")},
	} {
		c := l.pod("lan", func(cfg *runtimeapi.PodSandboxConfig) { cfg.DnsConfig = tc.dns }).idle("c")
		require.Equal(l, tc.want, c.sh("cat /etc/resolv.conf"), tc.name)
		require.Equal(l, hostFile(l, "/etc/hosts"), c.sh("cat /etc/hosts"), tc.name)
		require.Equal(l, "lan\nlan\n", c.sh("hostname; cat /etc/hostname"), tc.name)
		c.remove()
	}
}

func hostFile(l lab, path string) string {
	l.Helper()
	b, err := os.ReadFile(path)
	require.NoError(l, err)
	return string(b)
}
