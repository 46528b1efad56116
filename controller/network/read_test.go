// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package network

import (
	"fmt"
	"net"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/nftables"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

func TestReadReadsWhatCNIMade(t *testing.T) {
	pod, outside := podNetwork(t)
	eth, _ := pod.LinkByName("eth0")
	require.NoError(t, pod.RouteAdd(&netlink.Route{
		LinkIndex: eth.Attrs().Index, Dst: cidr(t, "192.0.2.0/24"), Gw: net.ParseIP("10.88.0.9"), Src: net.ParseIP("10.88.0.5"), Priority: 7, MTU: 1300,
	}))
	require.NoError(t, pod.RouteAdd(&netlink.Route{
		LinkIndex: eth.Attrs().Index, Dst: cidr(t, "198.51.100.1/32"), Scope: netlink.SCOPE_LINK,
	}))
	require.NoError(t, pod.NeighAdd(&netlink.Neigh{
		LinkIndex: eth.Attrs().Index, IP: net.ParseIP("10.88.0.9"), State: netlink.NUD_PERMANENT,
		HardwareAddr: net.HardwareAddr{2, 1, 1, 1, 1, 1},
	}))
	eth1, _ := addVeth(t, pod, outside, 1, 9000, "172.16.0.2/24", "fe80::7/64")
	require.NoError(t, pod.RouteAdd(&netlink.Route{LinkIndex: eth1.Attrs().Index, Dst: cidr(t, "2001:db8::/32")}))

	n, err := connect(t.Context(), t, pod.path)
	require.NoError(t, err)
	defer n.Close()
	require.Len(t, n.NICs, 1, "the first interface's device is the VM's own")
	require.Equal(t, "nic1", n.NICs[0].ID)
	require.Equal(t, "02:00:00:00:00:02", n.NICs[0].MAC.String())
	require.Equal(t, 9000, n.NICs[0].MTU)
	require.Len(t, n.NICs[0].Queues, 1)

	require.Len(t, n.Interfaces, 2)
	require.Equal(t, "eth0", n.Interfaces[0].Name)
	require.Equal(t, uint32(1450), n.Interfaces[0].Mtu)
	require.Equal(t, []string{"10.88.0.5/16", "fd00:88::5/64"}, n.Interfaces[0].Addresses, "and no link-local one")
	require.Len(t, n.Interfaces[0].Neighbors, 1)
	require.Equal(t, "02:01:01:01:01:01", n.Interfaces[0].Neighbors[0].Mac)
	require.Equal(t, []string{"172.16.0.2/24", "fe80::7/64"}, n.Interfaces[1].Addresses, "and no link-local one of the MAC's")

	var got []string
	for _, r := range n.Routes {
		got = append(got, fmt.Sprintf("%d %q via %q src %q dev %s scope %d prio %d mtu %d",
			r.Family, r.Destination, r.Gateway, r.Source, r.Device, r.Scope, r.Priority, r.Mtu))
	}
	for i, r := range n.Routes {
		require.Equal(t, i >= 5, r.GetGateway() != "", "what others go through comes first: %s", got[i])
	}
	require.ElementsMatch(t, []string{
		`2 "198.51.100.1/32" via "" src "" dev eth0 scope 253 prio 0 mtu 0`,
		`2 "10.88.0.0/16" via "" src "10.88.0.5" dev eth0 scope 253 prio 0 mtu 0`,
		`10 "fd00:88::/64" via "" src "" dev eth0 scope 0 prio 256 mtu 0`,
		`2 "172.16.0.0/24" via "" src "172.16.0.2" dev eth1 scope 253 prio 0 mtu 0`,
		`10 "2001:db8::/32" via "" src "" dev eth1 scope 0 prio 1024 mtu 0`,
		`2 "" via "10.88.0.1" src "" dev eth0 scope 0 prio 0 mtu 0`,
		`2 "192.0.2.0/24" via "10.88.0.9" src "10.88.0.5" dev eth0 scope 0 prio 7 mtu 1300`,
		`10 "" via "fd00:88::1" src "" dev eth0 scope 0 prio 1024 mtu 0`,
	}, got)
}

// TestReadRoutesAsTheyAre takes away what the kernel has made for an address, as the
// plugin ptp does, and gives two interfaces a default route.
func TestReadRoutesAsTheyAre(t *testing.T) {
	pod, outside := podNetwork(t)
	eth0, err := pod.LinkByName("eth0")
	require.NoError(t, err)
	eth1, _ := addVeth(t, pod, outside, 1, 1500, "172.16.0.2/24", "fd00:89::5/64")
	require.NoError(t, pod.RouteDel(&netlink.Route{LinkIndex: eth0.Attrs().Index, Dst: cidr(t, "fd00:88::/64")}))
	require.NoError(t, pod.RouteDel(&netlink.Route{LinkIndex: eth0.Attrs().Index, Dst: cidr(t, "10.88.0.0/16"), Scope: netlink.SCOPE_LINK}))
	for _, gw := range []string{"172.16.0.1", "fd00:89::1"} {
		require.NoError(t, pod.RouteAddEcmp(&netlink.Route{LinkIndex: eth1.Attrs().Index, Gw: net.ParseIP(gw)}))
	}
	n, err := Read(t.Context(), pod.path)
	require.NoError(t, err)
	var got []string
	for _, r := range n.Routes {
		got = append(got, fmt.Sprintf("%q via %q dev %s", r.Destination, r.Gateway, r.Device))
	}
	require.ElementsMatch(t, []string{
		`"172.16.0.0/24" via "" dev eth1`, `"fd00:89::/64" via "" dev eth1`,
		`"" via "172.16.0.1" dev eth1`, `"" via "10.88.0.1" dev eth0`,
		`"" via "fd00:89::1" dev eth1`, `"" via "fd00:88::1" dev eth0`,
	}, got)
	require.Less(t, slices.Index(got, `"" via "172.16.0.1" dev eth1`), slices.Index(got, `"" via "10.88.0.1" dev eth0`), "the one that counts comes first")
}

// TestReadTables reads what is not of an interface and the main table.
func TestReadTables(t *testing.T) {
	pod, _ := podNetwork(t)
	eth, err := pod.LinkByName("eth0")
	require.NoError(t, err)
	require.NoError(t, pod.AddrAdd(eth, &netlink.Addr{IPNet: cidr(t, "192.168.9.1/32"), Peer: cidr(t, "192.168.9.2/32")}))
	for _, r := range []*netlink.Route{
		{LinkIndex: eth.Attrs().Index, Gw: net.ParseIP("10.88.0.9"), Table: 100},
		{Dst: cidr(t, "198.51.100.0/24"), Type: unix.RTN_BLACKHOLE},
		{Dst: cidr(t, "2001:db8::/32"), Type: unix.RTN_UNREACHABLE, Table: 1000},
	} {
		require.NoError(t, pod.RouteAdd(r))
	}
	v4, v6, mask := netlink.NewRule(), netlink.NewRule(), uint32(0xff)
	v4.Family, v4.Priority, v4.Table, v4.Src = netlink.FAMILY_V4, 32000, 100, cidr(t, "10.88.0.5/32")
	v6.Family, v6.Priority, v6.Table, v6.Dst, v6.IifName, v6.Mark, v6.Mask, v6.Invert = netlink.FAMILY_V6, 7, 1000, cidr(t, "2001:db8::/32"), "eth0", 5, &mask, true
	require.NoError(t, pod.RuleAdd(v4))
	require.NoError(t, pod.RuleAdd(v6))
	n, err := Read(t.Context(), pod.path)
	require.NoError(t, err)
	require.Equal(t, map[string]string{"192.168.9.1/32": "192.168.9.2/32"}, n.Interfaces[0].Peers)
	var got []string
	for _, r := range n.Routes {
		if r.Table != 0 || r.Type != unix.RTN_UNICAST {
			got = append(got, fmt.Sprintf("%q via %q dev %q table %d type %d", r.Destination, r.Gateway, r.Device, r.Table, r.Type))
		}
	}
	require.ElementsMatch(t, []string{
		`"" via "10.88.0.9" dev "eth0" table 100 type 1`, `"198.51.100.0/24" via "" dev "" table 0 type 6`, `"2001:db8::/32" via "" dev "" table 1000 type 7`,
	}, got)
	require.Len(t, n.Rules, 2)
	for i, want := range []*guestv1.Rule{
		{Family: 2, Priority: 32000, Table: 100, Source: "10.88.0.5/32"},
		{Family: 10, Priority: 7, Table: 1000, Destination: "2001:db8::/32", Input: "eth0", Mark: 5, Mask: 0xff, Invert: true},
	} {
		require.True(t, proto.Equal(want, n.Rules[i]), "%v", n.Rules[i])
	}
	tos := netlink.NewRule()
	tos.Family, tos.Priority, tos.Table, tos.Tos = netlink.FAMILY_V4, 8, 100, 0x10
	require.NoError(t, pod.RuleAdd(tos))
	_, err = Read(t.Context(), pod.path)
	require.ErrorIs(t, err, errdefs.ErrNotImplemented)
}

// TestReadFirewalls tells of rules that would be passed by.
func TestReadFirewalls(t *testing.T) {
	pod, _ := podNetwork(t)
	read := func() []string {
		n, err := Read(t.Context(), pod.path)
		require.NoError(t, err)
		return n.Firewalls
	}
	require.Empty(t, read())
	forward, err := Listen(t.Context(), pod.path)
	require.NoError(t, err)
	defer forward.Close()
	require.Empty(t, read(), "the port-forwards' own")
	conn, err := openNftables(pod.NsHandle)
	require.NoError(t, err)
	for _, name := range []string{"mesh", "unused"} {
		table := conn.AddTable(&nftables.Table{Name: name, Family: nftables.TableFamilyINet})
		conn.AddChain(&nftables.Chain{Name: "led-to", Table: table})
		if name == "mesh" {
			conn.AddChain(&nftables.Chain{
				Name: "output", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityFilter,
			})
		}
	}
	require.NoError(t, conn.Flush())
	require.Equal(t, []string{"nftables table mesh"}, read())
}

func TestSortRoutes(t *testing.T) {
	t.Parallel()
	routes := []*guestv1.Route{{Gateway: "a", Priority: 1}, {Priority: 2}, {Gateway: "b", Priority: 3}, {Priority: 4}}
	sortRoutes(routes)
	var order []uint32
	for _, r := range routes {
		order = append(order, r.Priority)
	}
	require.Equal(t, []uint32{2, 4, 1, 3}, order)
}
