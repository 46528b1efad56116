// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testnode

import (
	"context"
	"crypto/rand"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// firewalls are ways in which a host keeps bridged packets back.
var firewalls = map[string]struct {
	// needs are programs, commands set the firewall up, show tells of it.
	needs    []string
	commands [][]string
	show     []string
}{
	"iptables": {[]string{"iptables", "ip6tables"}, [][]string{
		{"iptables", "-P", "FORWARD", "DROP"}, {"ip6tables", "-P", "FORWARD", "DROP"},
		{"iptables", "-A", "FORWARD", "-i", "docker0", "-j", "ACCEPT"},
	}, []string{"iptables", "-S"}},
	"nft": {[]string{"nft"}, [][]string{
		{"nft", "add table inet filter { chain forward { type filter hook forward priority 0; policy accept; iifname lo accept; drop; }; }"},
	}, []string{"nft", "list", "ruleset"}},
}

// TestFirewall checks that pods reach each other beside a firewall like Docker's,
// and that nothing is left of what lets them.
func TestFirewall(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make network namespaces")
	}
	for name, fw := range firewalls {
		t.Run(name, func(t *testing.T) {
			for _, program := range fw.needs {
				if _, err := exec.LookPath(program); err != nil {
					t.Skipf("needs %s: %v", program, err)
				}
			}
			n := &Node{opts: Options{Name: "fw"}}
			a, b := bridgedSockets(t, n.Bridge())
			// The first datagrams are lost, while the ports come up.
			require.NoError(t, Eventually(t.Context(), func(context.Context) error {
				if arrived := arrivals(t, a, b); arrived < len(ipFamilies) {
					return fmt.Errorf("without a firewall, %d protocols pass", arrived)
				}
				return nil
			}))
			require.NoError(t, n.openFirewall())
			for _, c := range fw.commands {
				require.NoError(t, command(c[0], c[1:]...))
			}
			before, err := exec.Command(fw.show[0], fw.show[1:]...).Output()
			require.NoError(t, err)
			require.Zero(t, arrivals(t, a, b), "the firewall keeps nothing back")

			// Twice, as after a node that was killed.
			require.NoError(t, n.openFirewall())
			require.NoError(t, n.openFirewall())
			require.Equal(t, len(ipFamilies), arrivals(t, a, b))
			require.NoError(t, n.closeFirewall())
			after, err := exec.Command(fw.show[0], fw.show[1:]...).Output()
			require.NoError(t, err)
			require.Equal(t, string(before), string(after))
			require.Zero(t, arrivals(t, a, b))
		})
	}
}

// bridgedSockets puts the test into a network namespace of its own, with a bridge
// and two ports whose other ends are in namespaces too, with a socket in each for
// each protocol.
func bridgedSockets(t *testing.T, bridge string) (a, b []*net.UDPConn) {
	t.Helper()
	runtime.LockOSThread() // for good: the thread ends with the test
	here := newNS(t)
	for _, f := range ipFamilies {
		if err := os.WriteFile("/proc/sys/net/bridge/"+f.sysctl, []byte("1"), 0o644); err != nil {
			t.Skipf("needs br_netfilter: %v", err)
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = bridge
	br := &netlink.Bridge{LinkAttrs: attrs}
	require.NoError(t, netlink.LinkAdd(br))
	require.NoError(t, netlink.LinkSetUp(br))
	port := func(name string, ips ...string) (conns []*net.UDPConn) {
		there := newNS(t)
		require.NoError(t, netns.Set(here))
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MasterIndex = name, br.Index
		require.NoError(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(there)}))
		l, err := netlink.LinkByName(name)
		require.NoError(t, err)
		require.NoError(t, netlink.LinkSetUp(l))
		require.NoError(t, netns.Set(there))
		l, err = netlink.LinkByName("eth0")
		require.NoError(t, err)
		require.NoError(t, netlink.LinkSetUp(l))
		for _, ip := range ips {
			addr, err := netlink.ParseAddr(ip)
			require.NoError(t, err)
			addr.Flags = ifaFNoDAD
			require.NoError(t, netlink.AddrAdd(l, addr))
			c, err := net.ListenUDP("udp", &net.UDPAddr{IP: addr.IP})
			require.NoError(t, err)
			t.Cleanup(func() { c.Close() })
			conns = append(conns, c)
		}
		require.NoError(t, netns.Set(here))
		return conns
	}
	return port("a", "10.0.0.1/24", "fd00::1/64"), port("b", "10.0.0.2/24", "fd00::2/64")
}

func newNS(t *testing.T) netns.NsHandle {
	t.Helper()
	ns, err := netns.New()
	require.NoError(t, err)
	t.Cleanup(func() { ns.Close() })
	return ns
}

// arrivals is the number of protocols by which a datagram of a's arrives at b's.
func arrivals(t *testing.T, a, b []*net.UDPConn) int {
	t.Helper()
	arrived := 0
	for i := range a {
		sent := rand.Text() // not one of an earlier call, late
		_, err := a[i].WriteTo([]byte(sent), b[i].LocalAddr())
		require.NoError(t, err)
		require.NoError(t, b[i].SetReadDeadline(time.Now().Add(Scale(300*time.Millisecond))))
		for err == nil {
			var k int
			buf := make([]byte, len(sent))
			if k, err = b[i].Read(buf); err == nil && string(buf[:k]) == sent {
				arrived++
				break
			}
		}
	}
	return arrived
}
