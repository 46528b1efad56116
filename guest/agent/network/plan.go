// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package network

import (
	"fmt"
	"math"
	"net"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// plan is a decoded request.
type plan struct {
	// builtIn is the address of the device that the VM has had from its start, or nil.
	builtIn net.HardwareAddr
	links   []link
	routes  []route
	rules   []*netlink.Rule
}

type link struct {
	name string
	mac  net.HardwareAddr
	// device is the address by which the device is found.
	device    net.HardwareAddr
	mtu       int
	addrs     []*netlink.Addr
	neighbors []*netlink.Neigh
}

type route struct {
	device string
	nl     *netlink.Route
}

func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}

// parse checks a request as a whole, so that nothing of a wrong one is applied.
func parse(req *guestv1.ConfigureRequest) (plan, error) {
	var p plan
	if mac := req.GetBuiltInMac(); mac != "" {
		var err error
		if p.builtIn, err = net.ParseMAC(mac); err != nil {
			return p, invalid("built-in MAC %q", mac)
		}
	}
	ifs, routes, rules := req.GetInterfaces(), req.GetRoutes(), req.GetRules()
	if len(ifs) > maxInterfaces || len(routes) > maxRoutes || len(rules) > maxRules {
		return p, invalid("%d interfaces, %d routes and %d rules: at most %d, %d and %d",
			len(ifs), len(routes), len(rules), maxInterfaces, maxRoutes, maxRules)
	}
	names := map[string]bool{}
	for _, i := range ifs {
		l, err := parseLink(i)
		if err != nil {
			return p, err
		}
		if names[l.name] {
			return p, invalid("two interfaces %q", l.name)
		}
		names[l.name] = true
		if len(p.links) == 0 && p.builtIn != nil {
			l.device = p.builtIn
		}
		p.links = append(p.links, l)
	}
	for _, r := range routes {
		if !names[r.GetDevice()] && (r.GetDevice() != "" || !leadsNowhere(r.GetType())) {
			return p, invalid("route by unknown interface %q", r.GetDevice())
		}
		nr, err := parseRoute(r)
		if err != nil {
			return p, err
		}
		p.routes = append(p.routes, nr)
	}
	// A route without a gateway makes gateways reachable: those first, wide scopes
	// after narrow ones.
	slices.SortStableFunc(p.routes, func(a, b route) int { return rank(a) - rank(b) })
	var err error
	p.rules, err = parseRules(rules, names)
	return p, err
}

// leadsNowhere is true for the types of routes that have no device.
func leadsNowhere(kind uint32) bool {
	return kind == unix.RTN_BLACKHOLE || kind == unix.RTN_UNREACHABLE || kind == unix.RTN_PROHIBIT || kind == unix.RTN_THROW
}

func rank(r route) int {
	switch {
	case r.nl.Gw == nil:
		return 0
	case r.nl.Dst != nil && !isDefault(r.nl.Dst):
		return 1
	default:
		return 2
	}
}

func isDefault(n *net.IPNet) bool {
	ones, _ := n.Mask.Size()
	return ones == 0 && n.IP.IsUnspecified()
}

// validName follows the kernel's dev_valid_name.
func validName(s string) bool {
	if s == "" || len(s) >= unix.IFNAMSIZ || s == "." || s == ".." || s == "lo" {
		return false
	}
	for _, c := range []byte(s) {
		if c <= ' ' || c >= 0x7f || c == '/' || c == ':' || c == '%' {
			return false
		}
	}
	return true
}

func parseLink(i *guestv1.Interface) (link, error) {
	l := link{name: i.GetName(), mtu: int(i.GetMtu())}
	if !validName(l.name) {
		return l, invalid("interface name %q", l.name)
	}
	var err error
	if l.mac, err = net.ParseMAC(i.GetMac()); err != nil || len(l.mac) != 6 {
		return l, invalid("interface %s: MAC %q", l.name, i.GetMac())
	}
	l.device = l.mac
	if l.mtu != 0 && (l.mtu < 68 || l.mtu > 65535) {
		return l, invalid("interface %s: MTU %d: want 68 to 65535", l.name, l.mtu)
	}
	if len(i.GetAddresses()) > maxAddresses || len(i.GetNeighbors()) > maxAddresses {
		return l, invalid("interface %s: more than %d addresses or neighbours", l.name, maxAddresses)
	}
	for _, a := range i.GetAddresses() {
		addr, err := parseAddr(a, i.GetPeers()[a])
		if err != nil {
			return l, fmt.Errorf("interface %s: %w", l.name, err)
		}
		l.addrs = append(l.addrs, addr)
	}
	for _, n := range i.GetNeighbors() {
		ne, err := parseNeighbor(n)
		if err != nil {
			return l, fmt.Errorf("interface %s: %w", l.name, err)
		}
		l.neighbors = append(l.neighbors, ne)
	}
	return l, nil
}

// parseAddr decodes an address, and its other end if that is not empty.
func parseAddr(s, peer string) (*netlink.Addr, error) {
	ip, ipnet, err := net.ParseCIDR(s)
	if err != nil {
		return nil, invalid("address %q: want CIDR", s)
	}
	ipnet.IP = ip
	// The routes that the kernel would make for the address come with the others.
	a := &netlink.Addr{IPNet: ipnet, Flags: unix.IFA_F_NOPREFIXROUTE}
	if v4 := ip.To4(); v4 != nil {
		ipnet.IP = v4
		if len(ipnet.Mask) == net.IPv6len {
			ipnet.Mask = ipnet.Mask[12:]
		}
		if ones, bits := ipnet.Mask.Size(); bits-ones >= 2 {
			a.Broadcast = broadcast(ipnet)
		}
	} else {
		// The address is the pod's already: it must be usable at once.
		a.Flags |= unix.IFA_F_NODAD
		if ip.IsLinkLocalUnicast() {
			a.Scope = unix.RT_SCOPE_LINK
		}
	}
	if peer == "" {
		return a, nil
	}
	other, n, err := net.ParseCIDR(peer)
	if err != nil || (other.To4() != nil) != (ip.To4() != nil) {
		return nil, invalid("address %q: peer %q: want CIDR of the same family", s, peer)
	}
	a.Peer, a.Broadcast = &net.IPNet{IP: other, Mask: n.Mask}, net.IPv4zero // has none
	return a, nil
}

func broadcast(n *net.IPNet) net.IP {
	b := make(net.IP, len(n.IP))
	for i := range b {
		b[i] = n.IP[i] | ^n.Mask[i]
	}
	return b
}

func parseNeighbor(n *guestv1.Neighbor) (*netlink.Neigh, error) {
	ip := net.ParseIP(n.GetAddress())
	mac, err := net.ParseMAC(n.GetMac())
	if ip == nil || err != nil {
		return nil, invalid("neighbour %q at %q", n.GetAddress(), n.GetMac())
	}
	state := int(n.GetState())
	if state == 0 {
		state = netlink.NUD_PERMANENT
	}
	ne := &netlink.Neigh{Family: unix.AF_INET6, State: state, Flags: int(n.GetFlags()), IP: ip, HardwareAddr: mac}
	if v4 := ip.To4(); v4 != nil {
		ne.Family, ne.IP = unix.AF_INET, v4
	}
	return ne, nil
}

func parseRoute(r *guestv1.Route) (route, error) {
	n := &netlink.Route{
		Scope:    netlink.Scope(r.GetScope()),
		Priority: int(r.GetPriority()),
		Flags:    int(r.GetFlags()),
		Family:   int(r.GetFamily()),
		MTU:      int(r.GetMtu()),
		Protocol: netlink.RouteProtocol(r.GetProtocol()),
		Type:     int(r.GetType()),
		Table:    int(r.GetTable()),
	}
	if r.GetTable() == unix.RT_TABLE_LOCAL || r.GetTable() > math.MaxInt32 {
		return route{}, invalid("route to %q: table %d", r.GetDestination(), r.GetTable())
	}
	var err error
	if n.Dst, err = destination(r); err != nil {
		return route{}, err
	}
	for _, a := range []struct {
		what, text string
		to         *net.IP
	}{{"gateway", r.GetGateway(), &n.Gw}, {"source", r.GetSource(), &n.Src}} {
		if a.text == "" {
			continue
		}
		ip := net.ParseIP(a.text)
		if ip == nil {
			return route{}, invalid("route to %q: %s %q", r.GetDestination(), a.what, a.text)
		}
		if v4 := ip.To4(); v4 != nil && n.Family == unix.AF_INET {
			ip = v4
		}
		if (ip.To4() != nil) != (n.Family == unix.AF_INET) {
			return route{}, invalid("route to %q: %s %q is of another family", r.GetDestination(), a.what, a.text)
		}
		*a.to = ip
	}
	if r.GetScope() > 255 || r.GetType() > 255 || r.GetProtocol() > 255 {
		return route{}, invalid("route to %q: scope, type or protocol above 255", r.GetDestination())
	}
	return route{device: r.GetDevice(), nl: n}, nil
}

// destination decodes a route's destination; a default route gets one too, as
// the library wants it. Without a family, the destination's own is meant.
func destination(r *guestv1.Route) (*net.IPNet, error) {
	if r.GetDestination() == "" {
		switch r.GetFamily() {
		case unix.AF_INET:
			return &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}, nil
		case unix.AF_INET6:
			return &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}, nil
		}
		return nil, invalid("default route of family %d", r.GetFamily())
	}
	_, dst, err := net.ParseCIDR(r.GetDestination())
	if err != nil {
		return nil, invalid("route to %q: want CIDR", r.GetDestination())
	}
	if v4 := dst.IP.To4(); (v4 != nil) != (r.GetFamily() == unix.AF_INET) || (r.GetFamily() != unix.AF_INET && r.GetFamily() != unix.AF_INET6) {
		return nil, invalid("route to %q: family %d", r.GetDestination(), r.GetFamily())
	}
	return dst, nil
}
