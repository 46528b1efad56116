// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package network

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Waiting is where the TAPs of VMs are that no pod has taken yet: a network
// namespace of their own, so that the host's shows nothing of them and none of its
// services looks after them. It is mounted at a path and outlives the process, as
// the VMs do.
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
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = unix.Mount("/proc/thread-self/ns/net", w.path, "", unix.MS_BIND, "")
		}
		result <- err
	}()
	return <-result
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

// Make makes the TAP of a VM. It goes with its last file, wherever it is by then.
func (w *Waiting) Make(vmID string) (*os.File, error) {
	ns, err := openNS(w.path)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	return createTAP(ns, tapName(vmID))
}

// move gives a VM's TAP to a pod's namespace. It waits for the kernel's RCU, some
// 15 ms.
func (w *Waiting) move(vmID string, to netns.NsHandle) error {
	ns, h, err := open(w.path)
	if err != nil {
		return err
	}
	defer ns.Close()
	defer h.Close()
	name := tapName(vmID)
	tap, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find the TAP of VM %s: %w: %w", vmID, err, errdefs.ErrNotFound)
	}
	if err := h.LinkSetNsFd(tap, int(to)); err != nil {
		return fmt.Errorf("move the TAP of VM %s: %w", vmID, err)
	}
	return nil
}

// tapName is the name of a VM's TAP.
func tapName(vmID string) string {
	sum := sha256.Sum256([]byte(vmID))
	return tapPrefix + hex.EncodeToString(sum[:(netlinkNameMax-len(tapPrefix))/2])
}

// netlinkNameMax is the longest name of a link.
const netlinkNameMax = unix.IFNAMSIZ - 1
