// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package network

import (
	"context"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

const mac = "02:00:00:00:00:05"

func eth0(change func(*guestv1.Interface)) []*guestv1.Interface {
	i := &guestv1.Interface{Name: "eth0", Mac: mac, Addresses: []string{"10.0.0.5/24"}}
	change(i)
	return []*guestv1.Interface{i}
}

func TestParseRefuses(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name   string
		ifs    []*guestv1.Interface
		routes []*guestv1.Route
	}{
		{"name", eth0(func(i *guestv1.Interface) { i.Name = "../x" }), nil},
		{"lo", eth0(func(i *guestv1.Interface) { i.Name = "lo" }), nil},
		{"long name", eth0(func(i *guestv1.Interface) { i.Name = "abcdefghijklmnop" }), nil},
		{"mac", eth0(func(i *guestv1.Interface) { i.Mac = "x" }), nil},
		{"infiniband mac", eth0(func(i *guestv1.Interface) { i.Mac = strings.Repeat("00:", 19) + "00" }), nil},
		{"mtu", eth0(func(i *guestv1.Interface) { i.Mtu = 67 }), nil},
		{"address", eth0(func(i *guestv1.Interface) { i.Addresses = []string{"10.0.0.5"} }), nil},
		{"peer", eth0(func(i *guestv1.Interface) { i.Peers = map[string]string{i.GetAddresses()[0]: "fd00::1/64"} }), nil},
		{"local table", eth0(func(*guestv1.Interface) {}), []*guestv1.Route{{Device: "eth0", Family: 2, Table: 255}}},
		{"no device", eth0(func(*guestv1.Interface) {}), []*guestv1.Route{{Family: 2}}},
		{"neighbour", eth0(func(i *guestv1.Interface) { i.Neighbors = []*guestv1.Neighbor{{Address: "x", Mac: mac}} }), nil},
		{"twice", append(eth0(func(*guestv1.Interface) {}), eth0(func(*guestv1.Interface) {})...), nil},
		{"device", nil, []*guestv1.Route{{Device: "eth1", Family: 2}}},
		{"family", eth0(func(*guestv1.Interface) {}), []*guestv1.Route{{Device: "eth0"}}},
		{"mixed families", eth0(func(*guestv1.Interface) {}), []*guestv1.Route{{Device: "eth0", Family: 2, Gateway: "fd00::1"}}},
		{"destination", eth0(func(*guestv1.Interface) {}), []*guestv1.Route{{Device: "eth0", Family: 10, Destination: "10.0.0.0/8"}}},
		{"scope", eth0(func(*guestv1.Interface) {}), []*guestv1.Route{{Device: "eth0", Family: 2, Scope: 256}}},
	} {
		_, err := parse(request("", tc.ifs, tc.routes...))
		require.True(t, errdefs.IsInvalidArgument(err), "%s: %v", tc.name, err)
	}
	for name, rule := range map[string]*guestv1.Rule{
		"family":      {Table: 5},
		"table":       {Family: 2},
		"high table":  {Family: 2, Table: 1 << 31},
		"priority":    {Family: 2, Table: 5, Priority: 1 << 31},
		"source":      {Family: 2, Table: 5, Source: "10.0.0.1"},
		"destination": {Family: 10, Table: 5, Destination: "10.0.0.1/32"},
		"interface":   {Family: 2, Table: 5, Input: "eth1"},
	} {
		r := request("", eth0(func(*guestv1.Interface) {}))
		r.Rules = []*guestv1.Rule{rule}
		_, err := parse(r)
		require.True(t, errdefs.IsInvalidArgument(err), "%s: %v", name, err)
	}
}

func TestParseOrdersRoutes(t *testing.T) {
	t.Parallel()
	p, err := parse(request("", eth0(func(*guestv1.Interface) {}),
		&guestv1.Route{Device: "eth0", Family: 2, Gateway: "169.254.1.1"},
		&guestv1.Route{Device: "eth0", Family: 2, Destination: "10.1.0.0/16", Gateway: "169.254.1.1"},
		&guestv1.Route{Device: "eth0", Family: 2, Destination: "169.254.1.1/32", Scope: 253},
	))
	require.NoError(t, err)
	var got []string
	for _, r := range p.routes {
		got = append(got, r.nl.Dst.String())
	}
	require.Equal(t, []string{"169.254.1.1/32", "10.1.0.0/16", "0.0.0.0/0"}, got)
}

func FuzzParse(f *testing.F) {
	f.Add("eth0", mac, "10.0.0.5/24", "10.0.0.0/8", "10.0.0.1", uint32(2))
	f.Add("eth0", mac, "fd00::5/64", "", "fd00::1", uint32(10))
	f.Fuzz(func(_ *testing.T, name, mac, addr, dst, gw string, family uint32) {
		r := request("",
			[]*guestv1.Interface{{Name: name, Mac: mac, Addresses: []string{addr}, Peers: map[string]string{addr: dst}, Neighbors: []*guestv1.Neighbor{{Address: gw, Mac: mac}}}},
			&guestv1.Route{Device: name, Destination: dst, Gateway: gw, Source: gw, Family: family, Type: family})
		r.Rules = []*guestv1.Rule{{Family: family, Table: family, Source: addr, Destination: dst, Input: name}}
		_, _ = parse(r)
	})
}

// request is one of a network.
func request(builtIn string, ifs []*guestv1.Interface, routes ...*guestv1.Route) *guestv1.ConfigureRequest {
	return &guestv1.ConfigureRequest{BuiltInMac: builtIn, Interfaces: ifs, Routes: routes}
}

// inNetns runs fn in a network namespace of its own, which ends with its thread.
func inNetns(t *testing.T, fn func()) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread is not to be used again
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Errorf("new network namespace: %v", err)
			return
		}
		fn()
	}()
	<-done
}

// plug adds a device with this MAC, and its other end.
func plug(t *testing.T, h *netlink.Handle, address string) {
	hw, err := net.ParseMAC(address)
	if err == nil {
		err = h.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "plugged", HardwareAddr: hw}, PeerName: "peer"})
	}
	if err == nil {
		err = h.LinkSetUp(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "peer"}})
	}
	if err != nil {
		t.Errorf("plug device: %v", err)
	}
}

func TestConfigure(t *testing.T) {
	t.Parallel()
	inNetns(t, func() {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			t.Error(err)
			return
		}
		defer h.Close()
		plug(t, h, mac)
		ifs := eth0(func(i *guestv1.Interface) {
			i.Mtu = 1400
			i.Addresses = append(i.Addresses, "fd00::5/64")
			i.Addresses = append(i.Addresses, "192.168.9.1/32")
			i.Peers = map[string]string{"192.168.9.1/32": "192.168.9.2/32"}
			i.Neighbors = []*guestv1.Neighbor{{Address: "10.0.0.9", Mac: "02:00:00:00:00:09"}}
		})
		routes := []*guestv1.Route{
			{Device: "eth0", Family: 2, Gateway: "172.31.0.1"}, // outside of every subnet
			{Device: "eth0", Family: 10, Gateway: "fd00::1"},
			{Device: "eth0", Family: 2, Destination: "192.168.0.0/16", Gateway: "169.254.1.1", Mtu: 1300},
			{Device: "eth0", Family: 2, Destination: "169.254.1.1/32", Scope: 253},
			{Device: "eth0", Family: 2, Destination: "10.0.0.0/24", Source: "10.0.0.5", Scope: 253, Protocol: unix.RTPROT_KERNEL},
			{Device: "eth0", Family: 2, Destination: "10.0.0.0/24", Source: "10.0.0.5", Scope: 253, Protocol: unix.RTPROT_KERNEL},
			{Device: "eth0", Family: 2, Gateway: "10.0.0.1"}, // the second
			{Device: "eth0", Family: 2, Gateway: "10.0.0.2", Table: 100},
			{Family: 2, Destination: "198.51.100.0/24", Type: unix.RTN_BLACKHOLE},
			{Family: 10, Destination: "2001:db8::/32", Type: unix.RTN_UNREACHABLE, Table: 1000},
		}
		r := request("", ifs, routes...)
		mask := uint32(0xff)
		r.Rules = []*guestv1.Rule{
			{Family: 2, Priority: 32000, Table: 100, Source: "10.0.0.5/32"},
			{Family: 10, Priority: 7, Table: 1000, Destination: "2001:db8::/32", Input: "eth0", Mark: 5, Mask: mask, Invert: true},
		}
		if err := Configure(t.Context(), r); err != nil {
			t.Errorf("configure: %v", err)
			return
		}
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			t.Error(err)
			return
		}
		if l.Attrs().MTU != 1400 || l.Attrs().Flags&net.FlagUp == 0 {
			t.Errorf("link %+v", l.Attrs())
		}
		checkState(t, l)
		checkTables(t)
		if err := Configure(t.Context(), r); err != nil {
			t.Errorf("configure again: %v", err)
		}
	})
}

// checkTables looks at what is not of the interface and the main table.
func checkTables(t *testing.T) {
	var got []string
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{}, netlink.RT_FILTER_TABLE)
	if err != nil {
		t.Error(err)
	}
	for _, r := range routes {
		if r.Type != unix.RTN_UNICAST && r.Table != unix.RT_TABLE_LOCAL || r.Table == 100 {
			got = append(got, fmt.Sprintf("%s type %d table %d via %s", r.Dst, r.Type, r.Table, r.Gw))
		}
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rules, err := netlink.RuleList(family)
		if err != nil {
			t.Error(err)
		}
		for _, r := range rules {
			if r.Table < unix.RT_TABLE_DEFAULT || r.Table > unix.RT_TABLE_LOCAL {
				got = append(got, fmt.Sprintf("%d from %s to %s by %s mark %x invert %v table %d", r.Priority, r.Src, r.Dst, r.IifName, r.Mark, r.Invert, r.Table))
			}
		}
	}
	slices.Sort(got)
	want := []string{
		"0.0.0.0/0 type 1 table 100 via 10.0.0.2", "198.51.100.0/24 type 6 table 254 via <nil>", "2001:db8::/32 type 7 table 1000 via <nil>",
		"32000 from 10.0.0.5/32 to <nil> by  mark 0 invert false table 100",
		"7 from <nil> to 2001:db8::/32 by eth0 mark 5 invert true table 1000",
	}
	if !slices.Equal(got, want) {
		t.Errorf("routes and rules %q", got)
	}
}

// dadTime is less than duplicate detection takes (a second and more), and more
// than the kernel needs to find that there is none to be done.
const dadTime = 500 * time.Millisecond

func checkState(t *testing.T, l netlink.Link) {
	found := map[string]bool{}
	var tentative []string
	for end := time.Now().Add(dadTime); ; {
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			t.Error(err)
		}
		tentative = nil
		for _, a := range addrs {
			found[a.IPNet.String()] = true
			if a.Peer != nil {
				found["peer "+a.Peer.String()] = true
			}
			if a.Flags&unix.IFA_F_TENTATIVE != 0 {
				tentative = append(tentative, a.IPNet.String())
			}
		}
		if len(tentative) == 0 || time.Now().After(end) {
			break
		}
	}
	if len(tentative) > 0 {
		t.Errorf("addresses %v are not usable yet", tentative)
	}
	if !found["10.0.0.5/24"] || !found["fd00::5/64"] || !found["peer 192.168.9.2/32"] {
		t.Errorf("addresses %v", found)
	}
	routes, err := netlink.RouteList(l, netlink.FAMILY_ALL)
	if err != nil {
		t.Error(err)
	}
	gateways := map[string]string{}
	for _, r := range routes {
		gateways[r.Dst.String()] += r.Gw.String()
	}
	if _, made := gateways["fd00::/64"]; made || gateways["10.0.0.0/24"] != "<nil>" {
		t.Errorf("routes to what is on the link that were not asked for, or not those that were: %v", gateways)
	}
	if gateways["0.0.0.0/0"] != "172.31.0.110.0.0.1" || gateways["::/0"] != "fd00::1" || gateways["192.168.0.0/16"] != "169.254.1.1" {
		t.Errorf("routes %v", gateways)
	}
	neighs, err := netlink.NeighList(l.Attrs().Index, netlink.FAMILY_V4)
	if err != nil || len(neighs) == 0 || neighs[0].State != netlink.NUD_PERMANENT {
		t.Errorf("neighbours %v, %v", neighs, err)
	}
}

func TestConfigureWaitsForDevice(t *testing.T) {
	t.Parallel()
	inNetns(t, func() {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			t.Error(err)
			return
		}
		defer h.Close()
		// On another thread, but by a socket of this namespace.
		time.AfterFunc(50*time.Millisecond, func() { plug(t, h, mac) })
		if err := Configure(t.Context(), request("", eth0(func(*guestv1.Interface) {}))); err != nil {
			t.Errorf("configure: %v", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		err = Configure(ctx, request("", eth0(func(i *guestv1.Interface) { i.Mac = "02:00:00:00:00:77" })))
		if err == nil {
			t.Error("a device that never comes was found")
		}
	})
}

// TestBuiltIn gives a device that has been there from the start to the first
// interface, also where the kernel has given that one's name to another, and
// takes it back.
func TestBuiltIn(t *testing.T) {
	t.Parallel()
	inNetns(t, func() {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			t.Error(err)
			return
		}
		defer h.Close()
		const builtIn = "02:63:68:76:00:00"
		plug(t, h, builtIn)
		if err := h.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "peer2"}); err != nil {
			t.Error(err)
			return
		}
		ifs := eth0(func(i *guestv1.Interface) { i.Addresses = append(i.Addresses, "fd00::5/64") })
		for range 2 {
			if err := Configure(t.Context(), request(builtIn, ifs, &guestv1.Route{Device: "eth0", Family: 2, Gateway: "10.0.0.1"})); err != nil {
				t.Errorf("configure: %v", err)
				return
			}
			dev, err := h.LinkByName("eth0")
			if err != nil || dev.Attrs().HardwareAddr.String() != mac || dev.Attrs().Flags&net.FlagUp == 0 {
				t.Errorf("eth0 is %+v, %v", dev, err)
				return
			}
			if err := Forget(request(builtIn, ifs)); err != nil {
				t.Errorf("forget: %v", err)
			}
			if dev, err = h.LinkByName("eth0"); err != nil || dev.Attrs().HardwareAddr.String() != builtIn || dev.Attrs().Flags&net.FlagUp != 0 {
				t.Errorf("eth0 is %+v, %v", dev, err)
				return
			}
			addrs, err := h.AddrList(dev, netlink.FAMILY_ALL)
			if err != nil || len(addrs) > 0 {
				t.Errorf("addresses %v, %v", addrs, err)
			}
		}
		if err := Configure(t.Context(), request("x", ifs)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("a wrong MAC: %v", err)
		}
	})
}
