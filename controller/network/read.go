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
		// The guest makes its link-local addresses itself, from the same MAC.
		if addr.IPNet == nil || addr.IP.To4() == nil && addr.IP.IsLinkLocalUnicast() {
			continue
		}
		iface.Addresses = append(iface.Addresses, addr.IPNet.String())
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

// readRoutes adds the routes over links, from the main table.
func (n *Network) readRoutes(h *netlink.Handle, links []netlink.Link) error {
	names := map[int]string{}
	for _, link := range links {
		names[link.Attrs().Index] = link.Attrs().Name
	}
	filter := &netlink.Route{Table: unix.RT_TABLE_MAIN}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := retry(func() ([]netlink.Route, error) {
			return h.RouteListFiltered(family, filter, netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return fmt.Errorf("list routes: %w", err)
		}
		for i := range routes {
			r := &routes[i]
			// The guest's kernel adds its own for addresses and router advertisements.
			if r.Protocol == unix.RTPROT_KERNEL || r.Protocol == unix.RTPROT_RA {
				continue
			}
			if len(r.MultiPath) > 0 || r.Encap != nil || r.Via != nil || r.Type != unix.RTN_UNICAST {
				return fmt.Errorf("route %s has several next hops, an encapsulation or a special type: %w", r, errdefs.ErrNotImplemented)
			}
			if name, ok := names[r.LinkIndex]; ok {
				n.Routes = append(n.Routes, guestRoute(r, family, name))
			}
		}
	}
	return nil
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
