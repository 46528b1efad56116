// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package network joins a VM to the network namespace that CNI made for its pod.
//
// The TAP of the network device that a VM has from its start is, and stays, in a
// namespace of its own: to move it to the pod's would take the kernel's RCU 12 to 28
// ms, and set it down meanwhile. A pair of veth devices leads from the one namespace
// to the other, and all that arrives at one end of a way is sent out of the other
// (an ingress qdisc with a u32 filter that matches everything and redirects, in both
// directions): from the pod's first interface to the pair, and from the pair to the
// TAP. Each further interface gets a TAP beside it, which is plugged in. The
// guest's interface takes over name, MAC, MTU, addresses, routes with their rules and permanent
// neighbours. CNI's interface keeps its addresses, so that the namespace
// still shows them, and CNI's own check and removal work; but as a redirected
// frame never reaches the namespace's own stack, nothing there answers ARP,
// neighbour discovery or duplicate address detection beside the guest.
package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

const (
	// linkPrefix begins the names of our devices.
	linkPrefix = "chv"
	// maxNICs bounds how many interfaces a pod may have.
	maxNICs = 4
	// socketTimeout bounds one netlink request.
	socketTimeout = 5 * time.Second
)

// Network is a pod's network as the VM gets it.
type Network struct {
	// Interfaces and Routes are for the guest's agent.
	Interfaces []*guestv1.Interface
	Routes     []*guestv1.Route
	Rules      []*guestv1.Rule
	// Firewalls are tables of rules in the namespace, for people: they do nothing to the
	// VM's frames.
	Firewalls []string
	// NICs are to be plugged into the VM, once it is joined to the network. The first
	// interface has none: its device is there from the start.
	NICs []vmm.NIC

	links []netlink.Link
}

// Close closes the TAPs' files. A TAP lives until its last file is closed, so
// after the hypervisor took its own the TAP stays as long as the hypervisor.
func (n *Network) Close() error {
	var errs []error
	for _, nic := range n.NICs {
		for _, q := range nic.Queues {
			errs = append(errs, q.Close())
		}
	}
	n.NICs = nil
	return errors.Join(errs...)
}

// Read reads what CNI made in the namespace at path. One without interfaces
// beside lo gives an empty Network. The caller closes the Network.
func Read(_ context.Context, path string) (*Network, error) {
	ns, h, err := open(path)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	defer h.Close()
	n := &Network{}
	if n.links, err = podLinks(h); err != nil {
		return nil, err
	}
	for _, link := range n.links {
		if err := n.read(h, link); err != nil {
			return nil, fmt.Errorf("read interface %s: %w", link.Attrs().Name, err)
		}
	}
	if err := errors.Join(n.readRoutes(h, n.links), n.readRules(h), n.readFirewall(ns)); err != nil {
		return nil, err
	}
	sortRoutes(n.Routes)
	return n, nil
}

// Join joins each interface that Read has found in the namespace at path to a TAP:
// the first to that of the VM, where w has it, the others to new ones, whose NICs it
// adds. A VM can be joined once. After an error no redirection is left.
func (n *Network) Join(ctx context.Context, path string, w *Waiting, vmID string) (retErr error) {
	if len(n.links) == 0 {
		return nil
	}
	ns, h, err := open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	defer h.Close()
	defer func() {
		if retErr != nil {
			retErr = errors.Join(retErr, n.Close(), remove(h, tapKind, pairKind))
		}
	}()
	name := linkName(vmID)
	if err := w.lead(ctx, vmID, ns, n.links[0].Attrs().MTU); err != nil {
		return err
	}
	for i, link := range n.links {
		if err := ctx.Err(); err != nil {
			return err
		}
		if i > 0 {
			name = fmt.Sprintf("%snic%d", linkPrefix, i)
			if err := failpoint.At(ctx, failpoint.JoinTAP); err != nil {
				return err
			}
			file, err := createTAP(ns, name)
			if err != nil {
				return err
			}
			n.NICs = append(n.NICs, vmm.NIC{
				ID:     fmt.Sprintf("nic%d", i),
				MAC:    link.Attrs().HardwareAddr,
				MTU:    link.Attrs().MTU,
				Queues: []*os.File{file},
			})
		}
		if err := failpoint.At(ctx, failpoint.JoinRedirect); err != nil {
			return err
		}
		if err := join(h, link, name); err != nil {
			return fmt.Errorf("join interface %s to %s: %w", link.Attrs().Name, name, err)
		}
	}
	return nil
}

// Disconnect ends what Join began: nothing passes any more, and TAPs go. What led to
// the VM's TAP stays, as its removal takes the kernel some 20 ms: it goes with the
// namespace, or by Clear. Disconnect is idempotent, and a namespace that is gone has
// nothing to end.
func Disconnect(_ context.Context, path string) error {
	return removeIn(path, func(_ netns.NsHandle, h *netlink.Handle) error { return remove(h, tapKind) })
}

// Clear undoes Join and Listen altogether. It is idempotent, and a namespace that is gone
// has nothing to undo.
func Clear(_ context.Context, path string) error {
	return removeIn(path, func(ns netns.NsHandle, h *netlink.Handle) error {
		return errors.Join(removeRedirection(ns), remove(h, tapKind, pairKind))
	})
}

// removeIn removes something in a namespace, if that is there.
func removeIn(path string, do func(netns.NsHandle, *netlink.Handle) error) error {
	if path == "" {
		return nil
	}
	ns, h, err := open(path)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer ns.Close()
	defer h.Close()
	return do(ns, h)
}

// open opens the namespace at path and a netlink handle in it. It returns
// ErrNotFound if there is no namespace at path, also when only its mount point
// was left.
func open(path string) (netns.NsHandle, *netlink.Handle, error) {
	ns, err := openNS(path)
	if err != nil {
		return netns.None(), nil, err
	}
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		_ = ns.Close()
		return netns.None(), nil, fmt.Errorf("netlink in network namespace %s: %w", path, err)
	}
	if err := h.SetSocketTimeout(socketTimeout); err != nil {
		h.Close()
		_ = ns.Close()
		return netns.None(), nil, fmt.Errorf("netlink in network namespace %s: %w", path, err)
	}
	return ns, h, nil
}

// openNS opens the namespace at path.
func openNS(path string) (netns.NsHandle, error) {
	ns, err := netns.GetFromPath(path)
	if errors.Is(err, fs.ErrNotExist) {
		return netns.None(), fmt.Errorf("network namespace %s: %w", path, errdefs.ErrNotFound)
	}
	if err != nil {
		return netns.None(), fmt.Errorf("open network namespace %s: %w", path, err)
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(ns), &st); err != nil || st.Type != unix.NSFS_MAGIC {
		_ = ns.Close()
		return netns.None(), fmt.Errorf("%s is no network namespace: %w", path, errdefs.ErrNotFound)
	}
	return ns, nil
}

// podLinks lists the interfaces that the guest is to have, in order of index.
func podLinks(h *netlink.Handle) ([]netlink.Link, error) {
	links, err := retry(h.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	var pod []netlink.Link
	for _, link := range links {
		a := link.Attrs()
		// Tunnel devices that the kernel makes in every namespace are down.
		if a.Flags&net.FlagLoopback != 0 || a.Flags&net.FlagUp == 0 || isOurs(link, tapKind, pairKind) {
			continue
		}
		if a.EncapType != "ether" || len(a.HardwareAddr) != 6 {
			return nil, fmt.Errorf("interface %s is %s, not ethernet, and cannot be given to a VM: %w",
				a.Name, a.EncapType, errdefs.ErrNotImplemented)
		}
		if a.MasterIndex != 0 {
			return nil, fmt.Errorf("interface %s is part of another one, such as a bond or a VRF, and cannot be given to a VM: %w",
				a.Name, errdefs.ErrNotImplemented)
		}
		pod = append(pod, link)
	}
	if len(pod) > maxNICs {
		return nil, fmt.Errorf("%d interfaces, and a pod may have %d: %w", len(pod), maxNICs, errdefs.ErrNotImplemented)
	}
	return pod, nil
}

// retry repeats a dump that the kernel says was interrupted by a change.
func retry[T any](dump func() (T, error)) (T, error) {
	var (
		v   T
		err error
	)
	for range 5 {
		if v, err = dump(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return v, err
}
