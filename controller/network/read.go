// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package network

import (
	"fmt"
	"net"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// read adds link with its addresses and permanent neighbours.
func (n *Network) read(h *netlink.Handle, link netlink.Link) error {
	a := link.Attrs()
	iface := &guestv1.Interface{Name: a.Name, Mac: a.HardwareAddr.String(), Mtu: uint32(a.MTU)}

	addrs, err := retry(func() ([]netlink.Addr, error) { return h.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	for _, addr := range addrs {
		// The guest makes the link-local address of its MAC itself.
		if addr.IPNet == nil || addr.IP.Equal(linkLocal(a.HardwareAddr)) {
			continue
		}
		iface.Addresses = append(iface.Addresses, addr.IPNet.String())
		if addr.Peer != nil && !addr.Peer.IP.Equal(addr.IP) {
			if iface.Peers == nil {
				iface.Peers = map[string]string{}
			}
			iface.Peers[addr.IPNet.String()] = addr.Peer.String()
		}
	}

	neighs, err := retry(func() ([]netlink.Neigh, error) { return h.NeighList(a.Index, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("list neighbours: %w", err)
	}
	for _, neigh := range neighs {
		if neigh.State&netlink.NUD_PERMANENT == 0 || neigh.IP == nil || neigh.IP.IsMulticast() || len(neigh.HardwareAddr) != 6 {
			continue
		}
		iface.Neighbors = append(iface.Neighbors, &guestv1.Neighbor{
			Address: neigh.IP.String(),
			Mac:     neigh.HardwareAddr.String(),
			State:   uint32(neigh.State),
			Flags:   uint32(neigh.Flags),
		})
	}
	n.Interfaces = append(n.Interfaces, iface)
	return nil
}

// readRoutes adds the routes over links and those that lead nowhere, of all tables but
// the kernel's own.
func (n *Network) readRoutes(h *netlink.Handle, links []netlink.Link) error {
	names := map[int]string{}
	for _, link := range links {
		names[link.Attrs().Index] = link.Attrs().Name
	}
	filter := &netlink.Route{Table: unix.RT_TABLE_UNSPEC} // all
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := retry(func() ([]netlink.Route, error) {
			return h.RouteListFiltered(family, filter, netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return fmt.Errorf("list routes: %w", err)
		}
		for i := range routes {
			r := &routes[i]
			if isGuestsOwn(r) {
				continue
			}
			for _, r := range hops(r, family) {
				if len(r.MultiPath) > 0 || r.Encap != nil || r.Via != nil || r.Type != unix.RTN_UNICAST && !leadsNowhere(r) {
					return fmt.Errorf("route %s has several next hops, an encapsulation or a special type: %w", r, errdefs.ErrNotImplemented)
				}
				if name, ok := names[r.LinkIndex]; ok || leadsNowhere(r) {
					n.Routes = append(n.Routes, guestRoute(r, family, name))
				}
			}
		}
	}
	return nil
}

// linkLocal is the link-local address that the kernel makes of a MAC.
func linkLocal(mac net.HardwareAddr) net.IP {
	return net.IP{0xfe, 0x80, 8: mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe, mac[3], mac[4], mac[5]}
}

// leadsNowhere is true for a route that has packets dropped or looked up elsewhere.
func leadsNowhere(r *netlink.Route) bool {
	return r.Type == unix.RTN_BLACKHOLE || r.Type == unix.RTN_UNREACHABLE || r.Type == unix.RTN_PROHIBIT || r.Type == unix.RTN_THROW
}

// isGuestsOwn is true for a route that the guest's kernel makes by itself: to its own and
// link-local addresses, and what router advertisements say. It makes none of the other
// addresses, so that a route which a CNI plugin has removed is not there either.
func isGuestsOwn(r *netlink.Route) bool {
	return r.Table == unix.RT_TABLE_LOCAL || r.Protocol == unix.RTPROT_RA ||
		r.Protocol == unix.RTPROT_KERNEL && (r.Type != unix.RTN_UNICAST || r.Table == unix.RT_TABLE_MAIN && isLinkLocal(r.Dst))
}

// isLinkLocal is true for the prefix of IPv6's link-local addresses.
func isLinkLocal(n *net.IPNet) bool {
	return n != nil && n.IP.To4() == nil && n.IP.IsLinkLocalUnicast()
}

// hops makes a route of each next hop of an IPv6 route: the kernel joins those to the
// same destination, as it did here, where two interfaces have a default route each.
func hops(r *netlink.Route, family int) []*netlink.Route {
	if family != netlink.FAMILY_V6 || len(r.MultiPath) == 0 {
		return []*netlink.Route{r}
	}
	var all []*netlink.Route
	for _, hop := range r.MultiPath {
		one := *r
		one.MultiPath, one.LinkIndex, one.Gw, one.Flags, one.Encap, one.Via = nil, hop.LinkIndex, hop.Gw, hop.Flags, hop.Encap, hop.Via
		all = append(all, &one)
	}
	return all
}

func guestRoute(r *netlink.Route, family int, device string) *guestv1.Route {
	route := &guestv1.Route{
		Device:   device,
		Scope:    uint32(r.Scope),
		Priority: uint32(r.Priority),
		Flags:    uint32(r.Flags & unix.RTNH_F_ONLINK),
		Family:   uint32(family),
		Mtu:      uint32(r.MTU),
		Protocol: uint32(r.Protocol),
		Type:     uint32(r.Type),
	}
	if r.Table != unix.RT_TABLE_MAIN {
		route.Table = uint32(r.Table)
	}
	if r.Dst != nil && !isDefault(r.Dst) {
		route.Destination = r.Dst.String()
	}
	if r.Gw != nil {
		route.Gateway = r.Gw.String()
	}
	if r.Src != nil {
		route.Source = r.Src.String()
	}
	return route
}

func isDefault(n *net.IPNet) bool {
	ones, _ := n.Mask.Size()
	return ones == 0 && n.IP.IsUnspecified()
}

// sortRoutes puts routes to what is on the link before those through a gateway,
// which need them.
func sortRoutes(routes []*guestv1.Route) {
	slices.SortStableFunc(routes, func(a, b *guestv1.Route) int {
		return btoi(a.GetGateway() != "") - btoi(b.GetGateway() != "")
	})
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}
