// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package network

import (
	"context"
	"net"
	"os"
	"runtime"
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
		{"neighbour", eth0(func(i *guestv1.Interface) { i.Neighbors = []*guestv1.Neighbor{{Address: "x", Mac: mac}} }), nil},
		{"twice", append(eth0(func(*guestv1.Interface) {}), eth0(func(*guestv1.Interface) {})...), nil},
		{"device", nil, []*guestv1.Route{{Device: "eth1", Family: 2}}},
		{"family", eth0(func(*guestv1.Interface) {}), []*guestv1.Route{{Device: "eth0"}}},
		{"mixed families", eth0(func(*guestv1.Interface) {}), []*guestv1.Route{{Device: "eth0", Family: 2, Gateway: "fd00::1"}}},
		{"destination", eth0(func(*guestv1.Interface) {}), []*guestv1.Route{{Device: "eth0", Family: 10, Destination: "10.0.0.0/8"}}},
		{"scope", eth0(func(*guestv1.Interface) {}), []*guestv1.Route{{Device: "eth0", Family: 2, Scope: 256}}},
	} {
		_, err := parse("", tc.ifs, tc.routes)
		require.True(t, errdefs.IsInvalidArgument(err), "%s: %v", tc.name, err)
	}
}

func TestParseOrdersRoutes(t *testing.T) {
	t.Parallel()
	p, err := parse("", eth0(func(*guestv1.Interface) {}), []*guestv1.Route{
		{Device: "eth0", Family: 2, Gateway: "169.254.1.1"},
		{Device: "eth0", Family: 2, Destination: "10.1.0.0/16", Gateway: "169.254.1.1"},
		{Device: "eth0", Family: 2, Destination: "169.254.1.1/32", Scope: 253},
	})
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
		_, _ = parse("",
			[]*guestv1.Interface{{Name: name, Mac: mac, Addresses: []string{addr}, Neighbors: []*guestv1.Neighbor{{Address: gw, Mac: mac}}}},
			[]*guestv1.Route{{Device: name, Destination: dst, Gateway: gw, Source: gw, Family: family}})
	})
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
			i.Neighbors = []*guestv1.Neighbor{{Address: "10.0.0.9", Mac: "02:00:00:00:00:09"}}
		})
		routes := []*guestv1.Route{
			{Device: "eth0", Family: 2, Gateway: "172.31.0.1"}, // outside of every subnet
			{Device: "eth0", Family: 10, Gateway: "fd00::1"},
			{Device: "eth0", Family: 2, Destination: "192.168.0.0/16", Gateway: "169.254.1.1", Mtu: 1300},
			{Device: "eth0", Family: 2, Destination: "169.254.1.1/32", Scope: 253},
			{Device: "eth0", Family: 2, Destination: "10.0.0.0/24", Source: "10.0.0.5", Scope: 253}, // the kernel's own
		}
		if err := Configure(t.Context(), "", ifs, routes); err != nil {
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
	})
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
	if !found["10.0.0.5/24"] || !found["fd00::5/64"] {
		t.Errorf("addresses %v", found)
	}
	routes, err := netlink.RouteList(l, netlink.FAMILY_ALL)
	if err != nil {
		t.Error(err)
	}
	gateways := map[string]string{}
	for _, r := range routes {
		gateways[r.Dst.String()] = r.Gw.String()
	}
	if gateways["0.0.0.0/0"] != "172.31.0.1" || gateways["::/0"] != "fd00::1" || gateways["192.168.0.0/16"] != "169.254.1.1" {
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
		if err := Configure(t.Context(), "", eth0(func(*guestv1.Interface) {}), nil); err != nil {
			t.Errorf("configure: %v", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		err = Configure(ctx, "", eth0(func(i *guestv1.Interface) { i.Mac = "02:00:00:00:00:77" }), nil)
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
			if err := Configure(t.Context(), builtIn, ifs, []*guestv1.Route{{Device: "eth0", Family: 2, Gateway: "10.0.0.1"}}); err != nil {
				t.Errorf("configure: %v", err)
				return
			}
			dev, err := h.LinkByName("eth0")
			if err != nil || dev.Attrs().HardwareAddr.String() != mac || dev.Attrs().Flags&net.FlagUp == 0 {
				t.Errorf("eth0 is %+v, %v", dev, err)
				return
			}
			if err := Forget(builtIn, ifs); err != nil {
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
		if err := Configure(t.Context(), "x", ifs, nil); !errdefs.IsInvalidArgument(err) {
			t.Errorf("a wrong MAC: %v", err)
		}
	})
}
