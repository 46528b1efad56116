// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// networkInterfaces runs pods with two interfaces, by two CNI networks. What is in the
// pod is what they have made, and both carry.
func networkInterfaces(l lab) {
	a, b := l.server("two"), l.server("two")
	view := a.requireSameNetwork("eth0", "eth1")
	require.Contains(l, view, fmt.Sprintf("eth0 mtu %d ", l.n.LANs()[0].MTU))
	require.Contains(l, view, fmt.Sprintf("eth1 mtu %d ", l.n.LANs()[1].MTU))
	for k, lan := range l.n.LANs() {
		dev := fmt.Sprintf("eth%d", k)
		for i := range lan.HostIPs() {
			ipA, ipB := a.address(dev, i), b.address(dev, i)
			require.NotEqual(l, ipA, ipB)
			b.reach("pod to pod by "+dev, ipA)
			hostTransfer(l.T, "host to pod by "+dev, serverAt(ipA), aFew)
		}
	}
	// The plugin sbr gives the second a table of routes of its own.
	c := l.server("sbr")
	view = c.requireSameNetwork("eth0", "eth1")
	require.Regexp(l, `default via \S+ dev eth1 table 100`, view)
	require.Regexp(l, `from `+c.address("eth1", 0)+` lookup 100`, view)
	hostTransfer(l.T, "host to pod by eth1", serverAt(c.address("eth1", 0)), aFew)
}

// networkRoutes has a plugin make routes, neighbours and addresses of all sorts, which
// are inside as in the namespace.
func networkRoutes(l lab) {
	lan := l.n.LANs()[0]
	l.setScript("ADD", routeScript(lan.HostIPs()))
	c := l.server("script")
	view := c.requireSameNetwork("eth0")
	for _, want := range []string{
		`198\.51\.100\.0/24 via \S+ dev eth0 +metric 7`,
		`192\.0\.2\.0/24 via 203\.0\.113\.7 dev eth0 +metric 50`,
		`192\.0\.2\.0/24 via \S+ dev eth0 +metric 60`,
		`203\.0\.113\.7 dev eth0 scope link`,
		`default via \S+ dev eth0 +metric 100`,
		`inet 192\.168\.77\.1`,
		`192\.168\.77\.2 dev eth0 scope link +src 192\.168\.77\.1`,
		`192\.168\.77\.1 peer 192\.168\.77\.2/32`,
		`default via \S+ dev eth0 table 77`,
		`32000:\s+from 192\.168\.77\.1 lookup 77`,
		`blackhole 198\.18\.0\.0/15`,
		`203\.0\.113\.9 dev eth0 lladdr 02:01:01:01:01:01 PERMANENT`,
	} {
		require.Regexp(l, want, view)
	}
	ips := lan.HostIPs()
	// The kernel's own limit for the route's packets, which is not shown by busybox.
	require.Equal(l, "1300 passes\n1301 is too large\n", c.probeBy(ips[0], 1300, 1301), "the route's MTU")
	hostTransfer(l.T, "host to pod", serverAt(c.ips()[0]), aFew)
	require.Equal(l, l.h == testnode.CloudHV, strings.Contains(l.n.LogTail(1<<20), "firewall rules that CNI made in the pod's network namespace"))
	// What comes later is not carried over.
	c.inNamespace("ip addr add 192.168.78.1/32 dev eth0")
	require.Equal(l, l.h == testnode.RunC, strings.Contains(c.sh("ip -4 addr show eth0"), "192.168.78.1"))
	if len(ips) < 2 {
		return
	}
	for _, want := range []string{
		`2001:db8:1::/48 via \S+ dev eth0 +metric 77`,
		`inet6 fe80::77/64`,
		`2001:db8::9 dev eth0 lladdr 02:01:01:01:01:01 PERMANENT`,
		subnet6(ips[1]) + ` via ` + ips[1].String() + ` dev eth0`,
	} {
		require.Regexp(l, want, view)
	}
	require.NotRegexp(l, `(?m)^`+subnet6(ips[1])+` dev eth0`, view, "a route that the plugin has removed")
	hostTransfer(l.T, "host to pod by IPv6", serverAt(c.ips()[1]), aFew)
}

func subnet6(ip netip.Addr) string { return netip.PrefixFrom(ip, 64).Masked().String() }

// routeScript is what a plugin does in a pod's namespace whose gateways are given.
func routeScript(gateways []netip.Addr) string {
	v4 := `
ip route add 198.51.100.0/24 via GW metric 7
ip route add 203.0.113.7/32 dev eth0 scope link
ip route add 192.0.2.0/24 via 203.0.113.7 metric 50
ip route add 192.0.2.0/24 via GW metric 60
ip route add default via GW metric 100
ip route add GW/32 dev eth0 mtu 1300
ip addr add 192.168.77.1 peer 192.168.77.2/32 dev eth0
ip route add default via GW table 77
ip rule add from 192.168.77.1 priority 32000 table 77
ip route add blackhole 198.18.0.0/15
iptables -w -A FORWARD -j ACCEPT
ip neigh add 203.0.113.9 lladdr 02:01:01:01:01:01 dev eth0 nud permanent
`
	text := strings.ReplaceAll(v4, "GW", gateways[0].String())
	if len(gateways) < 2 {
		return text
	}
	// As the plugin ptp does, what the kernel has made for the address is replaced.
	v6 := `
ip -6 route add 2001:db8:1::/48 via GW metric 77
ip -6 route add GW/128 dev eth0 metric 256
ip -6 route del SUBNET dev eth0
ip -6 route add SUBNET via GW
ip addr add fe80::77/64 dev eth0 nodad
ip -6 neigh add 2001:db8::9 lladdr 02:01:01:01:01:01 dev eth0 nud permanent
`
	return text + strings.NewReplacer("GW", gateways[1].String(), "SUBNET", subnet6(gateways[1])).Replace(v6)
}

// probeBy is probe to an echo on one of the host's addresses.
func (c *container) probeBy(host netip.Addr, sizes ...int) string {
	c.t.Helper()
	hostEcho(c.t, host)
	return c.probe(host.String(), sizes...)
}

// address is the global address of one of the container's interfaces, of IPv4 (0) or
// IPv6 (1).
func (c *container) address(dev string, family int) string {
	c.t.Helper()
	out := c.sh(fmt.Sprintf("ip -%s -o addr show dev %s scope global", []string{"4", "6"}[family], dev))
	m := regexp.MustCompile(`inet6? ([^/]+)/`).FindStringSubmatch(out)
	require.NotNil(c.t, m, out)
	return m[1]
}

// requireSameNetwork compares what is in the container with the pod's network namespace
// on the host: the interfaces, their MACs, MTUs and addresses, routes and their rules, and
// permanent neighbours. It returns what they have.
func (c *container) requireSameNetwork(devs ...string) string {
	c.t.Helper()
	script := "for d in " + strings.Join(devs, " ") + `; do ip -o link show dev $d; ip -o addr show dev $d; done
ip -4 route show table all; ip -6 route show table all; ip -4 rule; ip -6 rule; ip -4 neigh show nud permanent; ip -6 neigh show nud permanent
grep '^0* 00 .* eth' /proc/net/ipv6_route | sed 's/ [0-9a-f]* [0-9a-f]* [0-9a-f]* *\([a-z0-9]*\)$/ \1/'`
	want, got := networkView(c.inNamespace(script)), ""
	// The kernel makes a link-local address when it has seen the carrier, for which it takes
	// up to a second.
	ctx, cancel := context.WithTimeout(testContext(c.t), testnode.Scale(5*time.Second))
	defer cancel()
	_ = testnode.Eventually(ctx, func(context.Context) error {
		if got = networkView(c.sh(script)); got != want {
			return errdefs.ErrFailedPrecondition
		}
		return nil
	})
	require.Equal(c.t, want, got, "in the namespace, and inside")
	names := strings.Fields(c.sh("ls /sys/class/net"))
	slices.Sort(names)
	require.Equal(c.t, append(slices.Clone(devs), "lo"), slices.DeleteFunc(names, func(s string) bool { return !isPodDevice(s) }))
	return got
}

// inNamespace runs a script in the pod's network namespace on the host, whose ip is the
// image's.
func (c *container) inNamespace(script string) string {
	c.t.Helper()
	busybox, err := testimage.FindBusybox()
	require.NoError(c.t, err)
	script = fmt.Sprintf("ip() { %s ip \"$@\"; }\n%s", busybox, script)
	out, err := exec.Command("nsenter", "--net="+c.netNS(c.t), "--", busybox, "sh", "-ec", script).CombinedOutput()
	require.NoError(c.t, err, "%s", out)
	return string(out)
}

// isPodDevice leaves out tunnel devices that a kernel makes in every namespace.
func isPodDevice(name string) bool { return name == "lo" || strings.HasPrefix(name, "eth") }

var (
	linkLine  = regexp.MustCompile(`^\d+: ([^:@]+)(?:@[^:]+)?: <.*> mtu (\d+) .*link/ether (\S+)`)
	addrIndex = regexp.MustCompile(`^\d+: `)
	linkLocal = regexp.MustCompile(`^fe80::/64 dev \S+ +metric 256$`)
	addrFlags = regexp.MustCompile(` flags [0-9a-f]+| tentative| noprefixroute| *\\.*`)
	neighUse  = regexp.MustCompile(` used \S+| probes \d+| ref \d+`)
)

// networkView is what ip says, without what is a kernel's own affair, in order.
func networkView(text string) string {
	var lines []string
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || strings.Contains(line, "dev chv") || strings.Contains(line, "table local") || linkLocal.MatchString(line) {
			continue // what joins the namespace to the VM, and what is the kernel's
		}
		if m := linkLine.FindStringSubmatch(line); m != nil {
			line = fmt.Sprintf("%s mtu %s mac %s", m[1], m[2], m[3])
		}
		// That the routes of an address are made by another than the kernel is a flag of it.
		line = addrFlags.ReplaceAllString(addrIndex.ReplaceAllString(line, ""), "")
		lines = append(lines, neighUse.ReplaceAllString(line, ""))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}
