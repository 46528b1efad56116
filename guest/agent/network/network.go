// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package network gives the VM the addresses, routes and neighbours that CNI
// gave to the pod.
package network

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/uevent"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

const (
	// deviceLimit is how long a hot-plugged device may take to appear.
	deviceLimit = 20 * time.Second
	// maxInterfaces, maxAddresses, maxRoutes and maxRules bound a request.
	maxInterfaces = 16
	maxAddresses  = 64
	maxRoutes     = 1024
	maxRules      = 256
)

// Configure makes the network that a request says. It waits for the devices, by their
// MAC. The built-in device, if there is one, becomes the first interface; without
// interfaces it goes.
func Configure(ctx context.Context, r *guestv1.ConfigureRequest) error {
	plan, err := parse(r)
	if err != nil {
		return err
	}
	if len(plan.links) == 0 && plan.builtIn == nil {
		return nil
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	if len(plan.links) == 0 {
		return remove(ctx, h, plan.builtIn)
	}
	index := map[string]int{}
	for _, l := range plan.links {
		i, err := apply(ctx, h, l)
		if err != nil {
			return fmt.Errorf("interface %s: %w", l.name, err)
		}
		index[l.name] = i
	}
	if err := addRoutes(h, plan.routes, index); err != nil {
		return err
	}
	return addRules(h, plan.rules)
}

// Move waits for the devices and moves them to another network namespace, where a
// Configure of the same request finds them.
func Move(ctx context.Context, r *guestv1.ConfigureRequest, namespace int) error {
	plan, err := parse(r)
	if err != nil {
		return err
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	for _, l := range plan.links {
		dev, err := waitDevice(ctx, h, l.device)
		if err == nil {
			err = h.LinkSetNsFd(dev, namespace)
		}
		if err != nil {
			return fmt.Errorf("interface %s: move to the pod's namespace: %w", l.name, err)
		}
	}
	return nil
}

// Forget undoes a Configure of a VM that has only its built-in device, and no rules.
func Forget(r *guestv1.ConfigureRequest) error {
	plan, err := parse(r)
	if err != nil {
		return err
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	var errs []error
	for _, l := range plan.links {
		if err := reset(h, l); err != nil {
			errs = append(errs, fmt.Errorf("interface %s: %w", l.name, err))
		}
	}
	return errors.Join(errs...)
}

// reset makes a device what it was before apply. Its routes and its IPv6 addresses go
// when it is set down.
func reset(h *netlink.Handle, l link) error {
	dev, err := h.LinkByName(l.name)
	if err != nil {
		return err
	}
	errs := []error{h.LinkSetDown(dev)}
	for _, a := range l.addrs {
		if err := h.AddrDel(dev, a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			errs = append(errs, fmt.Errorf("remove address %s: %w", a.IPNet, err))
		}
	}
	return errors.Join(append(errs, h.LinkSetHardwareAddr(dev, l.device))...)
}

// apply finds and configures one device, and returns its index.
func apply(ctx context.Context, h *netlink.Handle, l link) (int, error) {
	dev, err := waitDevice(ctx, h, l.device)
	if err != nil {
		return 0, err
	}
	i := dev.Attrs().Index
	if err := rename(h, dev, l.name); err != nil {
		return 0, err
	}
	if !bytes.Equal(l.device, l.mac) {
		if err := h.LinkSetHardwareAddr(dev, l.mac); err != nil {
			return 0, fmt.Errorf("set MAC %s: %w", l.mac, err)
		}
	}
	if l.mtu != 0 && l.mtu != dev.Attrs().MTU {
		if err := h.LinkSetMTU(dev, l.mtu); err != nil {
			return 0, fmt.Errorf("set MTU %d: %w", l.mtu, err)
		}
	}
	quietIPv6(l)
	for _, a := range l.addrs {
		if err := h.AddrReplace(dev, a); err != nil {
			return 0, fmt.Errorf("add address %s: %w", a.IPNet, err)
		}
	}
	if err := h.LinkSetUp(dev); err != nil {
		return 0, fmt.Errorf("bring up: %w", err)
	}
	for _, n := range l.neighbors {
		n.LinkIndex = i
		if err := h.NeighSet(n); err != nil {
			return 0, fmt.Errorf("add neighbour %s: %w", n.IP, err)
		}
	}
	return i, nil
}

// rename names a device, and if need be takes the name from one that the kernel
// has given it to.
func rename(h *netlink.Handle, dev netlink.Link, name string) error {
	if dev.Attrs().Name == name {
		return nil
	}
	err := h.LinkSetName(dev, name)
	if errors.Is(err, unix.EEXIST) {
		var other netlink.Link
		if other, err = h.LinkByName(name); err == nil {
			err = h.LinkSetName(other, fmt.Sprintf("was%d", other.Attrs().Index))
		}
		if err == nil {
			err = h.LinkSetName(dev, name)
		}
	}
	if err != nil {
		return fmt.Errorf("rename %s to %s: %w", dev.Attrs().Name, name, err)
	}
	return nil
}

// virtioNet is where the kernel is told to let go of a network device.
const virtioNet = "/sys/bus/virtio/drivers/virtio_net/unbind"

// remove takes a network device from the kernel.
func remove(ctx context.Context, h *netlink.Handle, mac net.HardwareAddr) error {
	dev, err := waitDevice(ctx, h, mac)
	if err != nil {
		return err
	}
	name := dev.Attrs().Name
	id, err := os.Readlink(filepath.Join("/sys/class/net", name, "device"))
	if err == nil {
		err = os.WriteFile(virtioNet, []byte(filepath.Base(id)), 0)
	}
	if err != nil {
		return fmt.Errorf("remove %s: %w", name, err)
	}
	return nil
}

// quietIPv6 keeps the kernel from adding what CNI did not give, by router
// advertisements, and from delaying the link-local address for duplicate
// detection: the same address was checked, or not, in the pod's namespace. It
// must come before the link is up. Without IPv6 there is nothing to do.
func quietIPv6(l link) {
	dir := filepath.Join("/proc/sys/net/ipv6/conf", l.name)
	for _, f := range []string{"accept_ra", "accept_dad"} {
		_ = os.WriteFile(filepath.Join(dir, f), []byte("0"), 0)
	}
}

// waitDevice returns the device with this MAC, as soon as the kernel has it.
func waitDevice(ctx context.Context, h *netlink.Handle, mac net.HardwareAddr) (netlink.Link, error) {
	wctx, cancel := context.WithTimeout(ctx, deviceLimit)
	defer cancel()
	var found netlink.Link
	err := uevent.Await(wctx, 0, func() (bool, error) {
		links, err := h.LinkList()
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			return false, fmt.Errorf("list devices: %w", err)
		}
		for _, l := range links {
			if bytes.Equal(l.Attrs().HardwareAddr, mac) {
				found = l
				return true, nil
			}
		}
		return false, nil
	}, "net")
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return nil, fmt.Errorf("no device with MAC %s came within %v: %w", mac, deviceLimit, errdefs.ErrNotFound)
	}
	return found, err
}

// addRoutes adds the routes in an order in which each next hop is reachable. Of two to
// the same destination with the same metric the first counts, so each comes after those
// that are there.
func addRoutes(h *netlink.Handle, routes []route, index map[string]int) error {
	for _, r := range routes {
		if r.device != "" {
			r.nl.LinkIndex = index[r.device]
		}
		err := h.RouteAppend(r.nl)
		if errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) {
			// The gateway lies outside of every subnet: say that it is on this link,
			// which is what CNI plugins with such gateways mean.
			r.nl.Flags |= int(netlink.FLAG_ONLINK)
			err = h.RouteAppend(r.nl)
		}
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add route %s: %w", r.nl, err)
		}
	}
	return nil
}

// addRules adds the rules that say which table of routes is asked.
func addRules(h *netlink.Handle, rules []*netlink.Rule) error {
	for _, r := range rules {
		if err := h.RuleAdd(r); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add routing rule %d, %s: %w", r.Priority, r, err)
		}
	}
	return nil
}
