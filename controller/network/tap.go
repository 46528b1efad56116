// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package network

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// addrGenNone keeps the kernel from giving an interface a link-local address.
const addrGenNone = 1

// join redirects between link and our device of this name.
func join(h *netlink.Handle, link netlink.Link, name string) error {
	ours, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	if err := h.LinkSetMTU(ours, link.Attrs().MTU); err != nil {
		return fmt.Errorf("set the MTU of %s to %d: %w", name, link.Attrs().MTU, err)
	}
	if err := setUp(h, ours); err != nil {
		return err
	}
	return cross(h, ours, link)
}

// cross redirects between two devices, both ways.
func cross(h *netlink.Handle, a, b netlink.Link) error {
	return errors.Join(redirect(h, a, b), redirect(h, b, a))
}

// setUp sets a device of ours up, whose own end speaks to nobody: no address, no ARP. A
// TAP that is down refuses what the VM sends, and Cloud Hypervisor then gives the device
// up.
func setUp(h *netlink.Handle, ours netlink.Link) error {
	name := ours.Attrs().Name
	if err := h.LinkSetIP6AddrGenMode(ours, addrGenNone); err != nil && !errors.Is(err, unix.EAFNOSUPPORT) &&
		!errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("turn IPv6 off on %s: %w", name, err)
	}
	if err := h.LinkSetARPOff(ours); err != nil {
		return fmt.Errorf("turn ARP off on %s: %w", name, err)
	}
	if err := h.LinkSetUp(ours); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

// createTAP creates a TAP in a namespace, which goes with its last file.
func createTAP(ns netns.NsHandle, name string) (*os.File, error) {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return nil, fmt.Errorf("tap name %q: %w", name, err)
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	var fd int
	err = inNetNS(ns, func() error {
		var err error
		if fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0); err != nil {
			return fmt.Errorf("open /dev/net/tun: %w", err)
		}
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
			_ = unix.Close(fd)
			return fmt.Errorf("create tap %s: %w", name, err)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// inNetNS runs fn on a thread that is in the namespace. If the thread cannot be
// brought back it ends with its goroutine and serves nobody else.
func inNetNS(ns netns.NsHandle, fn func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		self, err := netns.Get()
		if err != nil {
			runtime.UnlockOSThread()
			result <- fmt.Errorf("get own network namespace: %w", err)
			return
		}
		defer self.Close()
		if err := netns.Set(ns); err != nil {
			runtime.UnlockOSThread()
			result <- fmt.Errorf("enter network namespace: %w", err)
			return
		}
		err = fn()
		if back := netns.Set(self); back == nil {
			runtime.UnlockOSThread()
		}
		result <- err
	}()
	return <-result
}

// redirect sends everything that arrives at from out of to.
func redirect(h *netlink.Handle, from, to netlink.Link) error {
	qdisc := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: from.Attrs().Index,
		Parent:    netlink.HANDLE_INGRESS,
		Handle:    netlink.MakeHandle(0xffff, 0),
	}}
	if err := h.QdiscAdd(qdisc); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add an ingress qdisc to %s: %w", from.Attrs().Name, err)
	}
	filter := &netlink.U32{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: from.Attrs().Index,
			Parent:    netlink.MakeHandle(0xffff, 0),
			Priority:  1,
			Protocol:  unix.ETH_P_ALL,
		},
		Actions: []netlink.Action{netlink.NewMirredAction(to.Attrs().Index)},
	}
	if err := h.FilterAdd(filter); err != nil {
		return fmt.Errorf("redirect %s to %s: %w", from.Attrs().Name, to.Attrs().Name, err)
	}
	return nil
}

// remove removes our devices of these kinds and all ingress qdiscs of others, with the
// redirections. What is gone already is no error.
func remove(h *netlink.Handle, kinds ...string) error {
	links, err := retry(h.LinkList)
	if err != nil {
		return fmt.Errorf("list interfaces: %w", err)
	}
	var errs []error
	for _, link := range links {
		a := link.Attrs()
		switch {
		case isOurs(link, kinds...):
			err = h.LinkDel(link)
		case a.Flags&net.FlagLoopback == 0:
			err = h.QdiscDel(&netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
				LinkIndex: a.Index, Parent: netlink.HANDLE_INGRESS, Handle: netlink.MakeHandle(0xffff, 0),
			}})
		default:
			continue
		}
		if err != nil && !isGone(err) {
			errs = append(errs, fmt.Errorf("disconnect %s: %w", a.Name, err))
		}
	}
	return errors.Join(errs...)
}

// The kinds of devices that Join makes in a pod's namespace.
const (
	tapKind  = "tuntap"
	pairKind = "veth"
)

// isOurs is true for a device of ours of one of these kinds.
func isOurs(link netlink.Link, kinds ...string) bool {
	return slices.Contains(kinds, link.Type()) && strings.HasPrefix(link.Attrs().Name, linkPrefix)
}

// isGone is true for what netlink says about a link or qdisc that is not there.
func isGone(err error) bool {
	var notFound netlink.LinkNotFoundError
	return errors.As(err, &notFound) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) ||
		errors.Is(err, unix.EINVAL)
}
