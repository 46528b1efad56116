// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testnode

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
)

// PodMTU is the MTU of the pods' network. It is not the usual one, so that a
// test sees whether it arrives.
const PodMTU = 1450

// subnets are the addresses of a node's pods. The host has each one's first.
type subnets struct {
	// v4 is a /24 and v6 a /64, invalid on a host without IPv6.
	v4, v6 netip.Prefix
}

// HostIPs are the host's addresses on the pods' network, IPv4 first; IPv6 is
// there only where the host has it.
func (n *Node) HostIPs() []netip.Addr { return n.subnet.hostIPs() }

func (s subnets) hostIPs() []netip.Addr {
	ips := []netip.Addr{s.v4.Addr().Next()}
	if s.v6.IsValid() {
		ips = append(ips, s.v6.Addr().Next())
	}
	return ips
}

// setUpNetwork makes the bridge and the CNI configuration. The bridge is the
// node's own and not made by the CNI plugin, which would turn the host into a
// router for good.
func (n *Node) setUpNetwork() (retErr error) {
	var err error
	if n.subnet, err = freeSubnets(n.opts.Name); err != nil {
		return err
	}
	defer func() {
		if retErr != nil {
			retErr = errors.Join(retErr, n.closeFirewall(), n.removeBridges())
		}
	}()
	if err := addBridge(n.Bridge(), PodMTU, n.HostIPs()); err != nil {
		return err
	}
	if err := n.setUpLANs(); err != nil {
		return err
	}
	if err := n.openFirewall(); err != nil {
		return fmt.Errorf("letting bridge %s through the firewall: %w", n.Bridge(), err)
	}
	return errors.Join(n.ownChains(), n.writeCNI())
}

// MakeBridgeAgain makes the node's bridge as it was, with the ports of the pods that are there,
// whatever has become of it.
func (n *Node) MakeBridgeAgain() error {
	if link, err := netlink.LinkByName(n.Bridge()); err == nil {
		if err := netlink.LinkDel(link); err != nil {
			return err
		}
	}
	if err := addBridge(n.Bridge(), PodMTU, n.HostIPs()); err != nil {
		return err
	}
	bridge, err := netlink.LinkByName(n.Bridge())
	if err != nil {
		return err
	}
	results, err := n.cniResults()
	for _, file := range results {
		var cached struct {
			Result struct {
				Interfaces []struct{ Name, Sandbox string }
			}
		}
		text, readErr := os.ReadFile(file)
		if readErr = errors.Join(readErr, json.Unmarshal(text, &cached)); readErr != nil {
			err = errors.Join(err, fmt.Errorf("CNI's result %s: %w", file, readErr))
			continue
		}
		for _, port := range cached.Result.Interfaces {
			if port.Sandbox != "" || port.Name == n.Bridge() {
				continue
			}
			link, findErr := netlink.LinkByName(port.Name)
			if findErr == nil {
				findErr = netlink.LinkSetMaster(link, bridge)
			}
			err = errors.Join(err, findErr)
		}
	}
	return err
}

// addBridge makes a bridge on which the host has the addresses given.
func addBridge(name string, mtu int, ips []netip.Addr) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = name, mtu
	br := &netlink.Bridge{LinkAttrs: attrs}
	if err := netlink.LinkAdd(br); err != nil {
		return fmt.Errorf("making bridge %s: %w", name, err)
	}
	for _, ip := range ips {
		bits := 24
		addr := &netlink.Addr{}
		if ip.Is6() {
			bits, addr.Flags = 64, ifaFNoDAD
		}
		addr.IPNet = &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(bits, ip.BitLen())}
		if err := netlink.AddrAdd(br, addr); err != nil {
			return fmt.Errorf("giving %s to bridge %s: %w", ip, name, err)
		}
	}
	if err := netlink.LinkSetUp(br); err != nil {
		return fmt.Errorf("bringing up bridge %s: %w", name, err)
	}
	return nil
}

// ifaFNoDAD is IFA_F_NODAD: the address is usable at once.
const ifaFNoDAD = 0x02

func (n *Node) writeCNI() error {
	ranges := [][]map[string]string{{{"subnet": n.subnet.v4.String(), "gateway": n.subnet.v4.Addr().Next().String()}}}
	routes := []map[string]string{{"dst": "0.0.0.0/0"}}
	if n.subnet.v6.IsValid() {
		ranges = append(ranges, []map[string]string{{"subnet": n.subnet.v6.String(), "gateway": n.subnet.v6.Addr().Next().String()}})
		routes = append(routes, map[string]string{"dst": "::/0"})
	}
	plugins := []any{map[string]any{
		"type":   "bridge",
		"bridge": n.Bridge(),
		"mtu":    PodMTU,
		"ipam": map[string]any{
			"type":    "host-local",
			"dataDir": n.Dir("cni", "ipam"),
			"ranges":  ranges,
			"routes":  routes,
		},
	}}
	if n.opts.HostPorts {
		plugins = append(plugins, map[string]any{"type": "portmap", "snat": true, "capabilities": map[string]bool{"portMappings": true}})
	}
	conf := map[string]any{"cniVersion": "1.0.0", "name": n.Bridge(), "plugins": plugins}
	b, err := json.MarshalIndent(conf, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(n.Dir("cni", "conf", "10-"+n.Bridge()+".conflist"), b, 0o644)
}

// removeBridges removes the bridges and the links that are still on them.
func (n *Node) removeBridges() error {
	var errs []error
	for _, name := range n.bridges() {
		errs = append(errs, removeBridge(name))
	}
	return errors.Join(errs...)
}

func removeBridge(name string) error {
	br, err := netlink.LinkByName(name)
	if notFound := (netlink.LinkNotFoundError{}); errors.As(err, &notFound) {
		return nil
	} else if err != nil {
		return err
	}
	links, err := netlink.LinkList()
	errs := []error{err}
	for _, l := range links {
		if l.Attrs().MasterIndex == br.Attrs().Index {
			errs = append(errs, netlink.LinkDel(l))
		}
	}
	return errors.Join(append(errs, netlink.LinkDel(br))...)
}

// freeSubnets chooses subnets by name that overlap with no address or route of
// the host.
func freeSubnets(name string) (subnets, error) {
	used, err := usedPrefixes()
	if err != nil {
		return subnets{}, err
	}
	h := fnv.New32a()
	h.Write([]byte(name))
	seed := h.Sum32()
	var s subnets
	for i := range uint32(1 << 14) {
		v := seed + i
		s.v4 = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(64 + v>>8&0x3f), byte(v), 0}), 24)
		if !overlaps(used, s.v4) {
			break
		}
		s.v4 = netip.Prefix{}
	}
	if !s.v4.IsValid() {
		return subnets{}, fmt.Errorf("no free subnet in 10.64.0.0/10: %w", errdefs.ErrResourceExhausted)
	}
	off, err := os.ReadFile("/proc/sys/net/ipv6/conf/all/disable_ipv6")
	if err != nil || strings.TrimSpace(string(off)) != "0" {
		return s, nil
	}
	for i := range uint32(256) {
		v := seed + i
		a := [16]byte{0xfd, 0x63, 0x68, 0x76, byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)}
		if p := netip.PrefixFrom(netip.AddrFrom16(a), 64); !overlaps(used, p) {
			s.v6 = p
			break
		}
	}
	return s, nil
}

// usedPrefixes are the destinations of the host's routes, default ones aside.
func usedPrefixes() ([]netip.Prefix, error) {
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return nil, fmt.Errorf("listing routes: %w", err)
	}
	var used []netip.Prefix
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		a, ok := netip.AddrFromSlice(r.Dst.IP)
		ones, _ := r.Dst.Mask.Size()
		if ok && ones > 0 {
			used = append(used, netip.PrefixFrom(a.Unmap(), ones))
		}
	}
	return used, nil
}

func overlaps(used []netip.Prefix, p netip.Prefix) bool {
	for _, u := range used {
		if u.Overlaps(p) {
			return true
		}
	}
	return false
}
