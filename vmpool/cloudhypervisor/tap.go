// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package cloudhypervisor

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmproc"
)

// setMTU sets the MTU of a NIC's TAP, in whichever namespace that is.
func (vm *machine) setMTU(nic vmm.NIC) error {
	if nic.MTU == 0 {
		return nil
	}
	if err := vm.Check(); err != nil {
		return err
	}
	return vmproc.WithFDs(nic.Queues[:1], func(fds []int) error { return setMTU(fds[0], nic.MTU) })
}

func setMTU(tap, mtu int) (retErr error) {
	req, err := unix.NewIfreq("tap") // the kernel writes the name
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(tap, unix.TUNGETIFF, req); err != nil {
		return fmt.Errorf("find the TAP's name: %w", err)
	}
	ns, err := unix.IoctlRetInt(tap, unix.TUNGETDEVNETNS)
	if err != nil {
		return fmt.Errorf("find the TAP's namespace: %w", err)
	}
	defer func() { retErr = errors.Join(retErr, unix.Close(ns)) }()
	handle, err := netlink.NewHandleAt(netns.NsHandle(ns), unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer handle.Close()
	link, err := handle.LinkByName(req.Name())
	if err != nil {
		return fmt.Errorf("find the TAP: %w", err)
	}
	return handle.LinkSetMTU(link, mtu)
}
