// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testnode

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
)

// Network is a CNI configuration of a node, beside the usual one. CRI has a directory of
// configurations for each runtime handler, so pods get it by a handler of its own, which
// is otherwise the same.
type Network struct {
	// Name is 1 to 8 of [a-z0-9].
	Name string
	// Chains each give a pod an interface: eth0, eth1 and so on.
	Chains []Chain
}

// Chain is the CNI plugin bridge, and what comes after it.
type Chain struct {
	// LAN is one of the node's: 0 or 1.
	LAN int
	// OnlyIPv6 leaves the interface without IPv4, NoDefault without default routes.
	OnlyIPv6, NoDefault bool
	// Plugins are chained after bridge: each is its configuration.
	Plugins []map[string]any
}

// Handler is the name of the handler h for pods in the network.
func (net Network) Handler(h string) string { return h + "-" + net.Name }

// LAN is a further bridge of a node, on which the host has the first addresses.
type LAN struct {
	Bridge string
	MTU    int
	subnet subnets
}

// HostIPs are the host's addresses on the LAN, as Node.HostIPs.
func (l LAN) HostIPs() []netip.Addr { return l.subnet.hostIPs() }

// lanMTUs are the MTUs of a node's LANs: the pods' usual one, and jumbo frames.
var lanMTUs = []int{PodMTU, 9000}

// LANs are the further bridges of a node with Options.Networks.
func (n *Node) LANs() []LAN { return n.lans }

// CNIBinDir is a directory for CNI plugins of a test's own, beside Options.CNIBinDir.
func (n *Node) CNIBinDir() string { return n.Dir("cni", "bin") }

// MissingPlugins are those of the plugins in Options.Networks, beside a test's own, that
// are not there.
func (n *Node) MissingPlugins(own ...string) []string {
	var missing []string
	for _, net := range n.opts.Networks {
		for _, c := range net.Chains {
			for _, p := range c.Plugins {
				name, _ := p["type"].(string)
				_, err := os.Stat(filepath.Join(n.opts.CNIBinDir, name))
				if err != nil && !slices.Contains(own, name) && !slices.Contains(missing, name) {
					missing = append(missing, name)
				}
			}
		}
	}
	return missing
}

// bridges are the names of the bridges that a node of the name may have.
func (n *Node) bridges() []string {
	names := []string{n.Bridge()}
	for i := range lanMTUs {
		names = append(names, fmt.Sprintf("ch%d-%s", i, n.opts.Name))
	}
	return names
}

func (n *Node) confDir(net Network) string { return n.Dir("cni", "conf-"+net.Name) }

// setUpLANs makes the bridges of Options.Networks, and writes these.
func (n *Node) setUpLANs() error {
	if len(n.opts.Networks) == 0 {
		return nil
	}
	for i, mtu := range lanMTUs {
		l := LAN{Bridge: n.bridges()[i+1], MTU: mtu}
		var err error
		if l.subnet, err = freeSubnets(l.Bridge); err != nil {
			return err
		}
		if err := addBridge(l.Bridge, mtu, l.HostIPs()); err != nil {
			return err
		}
		n.lans = append(n.lans, l)
	}
	for i, net := range n.opts.Networks {
		if err := os.MkdirAll(n.confDir(net), 0o755); err != nil {
			return err
		}
		for k, c := range net.Chains {
			if err := n.writeChain(i, k, c); err != nil {
				return err
			}
		}
	}
	return nil
}

// writeChain writes chain k of network i.
func (n *Node) writeChain(i, k int, c Chain) error {
	l, net := n.lans[c.LAN], n.opts.Networks[i]
	var ranges [][]map[string]string
	var routes []map[string]string
	if !c.OnlyIPv6 {
		ranges, routes = append(ranges, ipRange(l.subnet.v4, i)), append(routes, map[string]string{"dst": "0.0.0.0/0"})
	}
	if l.subnet.v6.IsValid() {
		ranges, routes = append(ranges, ipRange(l.subnet.v6, i)), append(routes, map[string]string{"dst": "::/0"})
	}
	ipam := map[string]any{"type": "host-local", "dataDir": n.Dir("cni", "ipam"), "ranges": ranges}
	if !c.NoDefault {
		ipam["routes"] = routes
	}
	plugins := []map[string]any{{"type": "bridge", "bridge": l.Bridge, "mtu": l.MTU, "ipam": ipam}}
	// A name of the node's, by which its results are found.
	name := fmt.Sprintf("%s-%s%d", n.Bridge(), net.Name, k)
	b, err := json.MarshalIndent(map[string]any{"cniVersion": "1.0.0", "name": name, "plugins": append(plugins, c.Plugins...)}, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(fmt.Sprintf("%s/%d.conflist", n.confDir(net), k), b, 0o644)
}

// rangeSize is how many addresses of a LAN a network has.
const rangeSize = 20

// ipRange is network i's part of a subnet, as host-local takes it.
func ipRange(p netip.Prefix, i int) []map[string]string {
	nth := func(k int) string {
		b := p.Addr().AsSlice()
		b[len(b)-1] += byte(k)
		a, _ := netip.AddrFromSlice(b)
		return a.String()
	}
	first := 10 + i*rangeSize
	return []map[string]string{{"subnet": p.String(), "gateway": nth(1), "rangeStart": nth(first), "rangeEnd": nth(first + rangeSize - 1)}}
}
