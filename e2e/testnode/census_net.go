// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testnode

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// strayTAP begins the names of our TAPs, which have no business in the host's
// own network namespace.
const strayTAP = "tap_chv"

// countNetwork counts network namespaces, links and what CNI keeps of them.
func (n *Node) countNetwork(items map[string]int) error {
	spaces, err := n.namespaces()
	if err != nil {
		return err
	}
	items["network namespace"] += len(spaces)
	cached, err := n.cniResults()
	items["CNI result"] += len(cached)
	for _, path := range spaces {
		err = errors.Join(err, countInside(items, path))
	}
	return errors.Join(err, n.countLinks(items, spaces))
}

// countInside counts what is in a network namespace: links, filters of traffic control, and
// tables of nftables. One that has gone meanwhile has nothing.
func countInside(items map[string]int, path string) error {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return nil
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("looking into network namespace %s: %w", path, err)
	}
	defer h.Close()
	links, err := h.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("listing links of network namespace %s: %w", path, err)
	}
	for _, l := range links {
		if l.Attrs().Flags&net.FlagLoopback != 0 {
			continue
		}
		items["inner link "+l.Type()]++
		// One that has gone meanwhile has none.
		filters, _ := h.FilterList(l, netlink.MakeHandle(0xffff, 0))
		if len(filters) > 0 {
			items["inner filter"] += len(filters)
		}
	}
	conn, err := nftables.New(nftables.WithNetNSFd(int(ns)))
	if err != nil {
		return fmt.Errorf("looking at nftables in network namespace %s: %w", path, err)
	}
	tables, err := conn.ListTables()
	if err != nil {
		return nil // a kernel without nftables
	}
	for _, t := range tables {
		items["inner nftables table "+t.Name]++
	}
	return nil
}

// cniResults are the files that libcni has of the node's pods.
func (n *Node) cniResults() ([]string, error) {
	return filepath.Glob(filepath.Join(cniCache, n.Bridge()+"-*"))
}

// namespaces are the network namespaces that the node's mounts and processes
// keep, containerd among them, by inode, with a path to open each by: one that
// has lost its mount is no less there.
func (n *Node) namespaces() (map[uint64]string, error) {
	ms, err := n.mounts()
	if err != nil {
		return nil, err
	}
	ps, err := n.processes()
	if err != nil {
		return nil, err
	}
	spaces := map[uint64]string{}
	add := func(path string) {
		// What has gone meanwhile keeps nothing.
		if info, err := os.Stat(path); err == nil {
			spaces[info.Sys().(*syscall.Stat_t).Ino] = path
		}
	}
	for _, m := range ms {
		if m.FSType == "nsfs" && strings.HasPrefix(m.Root, "net:[") {
			add(m.Mountpoint)
		}
	}
	for _, p := range append(ps, proc{pid: n.Pid()}) {
		if p.pid == 0 {
			continue
		}
		dir := fmt.Sprintf("/proc/%d/", p.pid)
		add(dir + "ns/net")
		fds, _ := os.ReadDir(dir + "fd")
		for _, fd := range fds {
			path := dir + "fd/" + fd.Name()
			if to, err := os.Readlink(path); err == nil && strings.HasPrefix(to, "net:[") {
				add(path)
			}
		}
	}
	own, err := os.Stat("/proc/self/ns/net")
	if err != nil {
		return nil, err
	}
	delete(spaces, own.Sys().(*syscall.Stat_t).Ino)
	return spaces, nil
}

// countLinks counts the bridges' ports, TAPs of ours that have lost their way, and
// veths that are on no bridge and lead to one of the node's namespaces.
func (n *Node) countLinks(items map[string]int, spaces map[uint64]string) error {
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("listing links: %w", err)
	}
	ids := map[int]bool{}
	for _, path := range spaces {
		f, err := os.Open(path)
		if err != nil {
			continue // it has gone
		}
		if id, err := netlink.GetNetNsIdByFd(int(f.Fd())); err == nil && id >= 0 {
			ids[id] = true
		}
		f.Close()
	}
	bridges := map[int]bool{}
	for _, l := range links {
		if slices.Contains(n.bridges(), l.Attrs().Name) {
			bridges[l.Attrs().Index] = true
		}
	}
	for _, l := range links {
		a := l.Attrs()
		switch {
		case bridges[a.MasterIndex], l.Type() == "tuntap" && strings.HasPrefix(a.Name, strayTAP):
			items["link "+l.Type()]++
		case l.Type() == "veth" && a.MasterIndex == 0 && ids[a.NetNsID]:
			items["link veth without a bridge"]++
		}
	}
	return nil
}
