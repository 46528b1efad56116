// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package network

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/api/thread"
	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
)

// Waiting is where the TAPs of VMs are: a network namespace of their own, so that the
// host's shows nothing of them and none of its services looks after them. It is
// mounted at a path and outlives the process, as the VMs do.
type Waiting struct{ path string }

// OpenWaiting makes the namespace at path unless it is there.
func OpenWaiting(path string) (*Waiting, error) {
	w := &Waiting{path: path}
	ns, err := openNS(path)
	if err == nil {
		return w, ns.Close()
	}
	if !errdefs.IsNotFound(err) {
		return nil, err
	}
	if err := w.mount(); err != nil {
		return nil, fmt.Errorf("make a network namespace at %s: %w: %w", path, err, errdefs.ErrFailedPrecondition)
	}
	return w, nil
}

// mount makes the namespace on a thread that ends with it.
func (w *Waiting) mount() error {
	if err := os.MkdirAll(filepath.Dir(w.path), 0o711); err != nil {
		return err
	}
	f, err := os.OpenFile(w.path, os.O_CREATE|os.O_RDONLY, 0o600)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return thread.Run(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		return unix.Mount("/proc/thread-self/ns/net", w.path, "", unix.MS_BIND, "")
	})
}

// Remove removes the namespace, and with it the TAPs that are still in it. What is
// not there is no error.
func (w *Waiting) Remove() error {
	err := unix.Unmount(w.path, unix.MNT_DETACH)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		err = nil
	}
	if removeErr := os.Remove(w.path); removeErr != nil && !errors.Is(removeErr, fs.ErrNotExist) {
		err = errors.Join(err, removeErr)
	}
	return err
}

// Make makes the TAP of a VM, and sets it up: what the VM sends is lost. It goes with
// its last file.
func (w *Waiting) Make(vmID string) (_ *os.File, retErr error) {
	ns, h, err := open(w.path)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	defer h.Close()
	name := linkName(vmID)
	file, err := createTAP(ns, name)
	if err != nil {
		return nil, err
	}
	defer func() {
		if retErr != nil {
			_ = file.Close()
		}
	}()
	tap, err := h.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("find the TAP of VM %s: %w", vmID, err)
	}
	return file, setUp(h, tap)
}

// lead makes a pair of devices from a VM's TAP to a pod's namespace, where its end has
// the name that linkName gives. The pair goes with either namespace, and when its end
// in the pod's is removed. It returns ErrNotFound for a VM without a TAP, and
// ErrAlreadyExists for one that has a pair; after an error there is none.
func (w *Waiting) lead(ctx context.Context, vmID string, to netns.NsHandle, mtu int) (retErr error) {
	ns, h, err := open(w.path)
	if err != nil {
		return err
	}
	defer ns.Close()
	defer h.Close()
	name := linkName(vmID)
	tap, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find the TAP of VM %s: %w: %w", vmID, err, errdefs.ErrNotFound)
	}
	if err := h.LinkSetMTU(tap, mtu); err != nil {
		return fmt.Errorf("set the MTU of the TAP of VM %s to %d: %w", vmID, mtu, err)
	}
	pair := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: leadPrefix + strings.TrimPrefix(name, linkPrefix), MTU: mtu},
		PeerName:  name, PeerNamespace: netlink.NsFd(int(to)), PeerMTU: uint32(mtu), //nolint:gosec // an MTU
	}
	if err := failpoint.At(ctx, failpoint.JoinPair); err != nil {
		return err
	}
	err = h.LinkAdd(pair)
	if errors.Is(err, unix.EEXIST) {
		err = errdefs.ErrAlreadyExists
	}
	if err != nil {
		return fmt.Errorf("lead from the TAP of VM %s to its pod: %w", vmID, err)
	}
	defer func() {
		if retErr != nil {
			retErr = errors.Join(retErr, h.LinkDel(pair))
		}
	}()
	if err := failpoint.At(ctx, failpoint.JoinPairUp); err != nil {
		return err
	}
	if err := setUp(h, pair); err != nil {
		return err
	}
	return cross(h, tap, pair)
}

// leadPrefix begins the names of the pairs' ends here. It is as long as linkPrefix.
const leadPrefix = "chp"

// linkName is the name of a VM's TAP, and of what leads to it in its pod's namespace.
func linkName(vmID string) string {
	sum := sha256.Sum256([]byte(vmID))
	return linkPrefix + hex.EncodeToString(sum[:(netlinkNameMax-len(linkPrefix))/2])
}

// netlinkNameMax is the longest name of a link.
const netlinkNameMax = unix.IFNAMSIZ - 1
