// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package disk finds the VM's disks by their serial, which is the one name that
// host and guest share for a disk.
package disk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/uevent"
)

// MaxSerial is the longest serial of a virtio-blk disk, in bytes.
const MaxSerial = 20

// Finder finds disks. The zero value looks at this machine's.
type Finder struct {
	// Sys and Dev replace /sys and /dev in tests.
	Sys, Dev string
}

// ValidSerial says whether s is 1 to MaxSerial of [a-z0-9-].
func ValidSerial(s string) bool {
	if s == "" || len(s) > MaxSerial {
		return false
	}
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

// Wait returns the device node of the disk with this serial. It waits until the
// kernel has it, for limit at most, and then fails with ErrNotFound.
func (f Finder) Wait(ctx context.Context, serial string, limit time.Duration) (string, error) {
	if !ValidSerial(serial) {
		return "", fmt.Errorf("disk serial %q: want 1 to %d of [a-z0-9-]: %w", serial, MaxSerial, errdefs.ErrInvalidArgument)
	}
	wctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var node string
	err := uevent.Await(wctx, 0, func() (bool, error) {
		var err error
		node, err = f.find(serial)
		return node != "", err
	}, "block")
	switch {
	case errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil:
		return "", fmt.Errorf("no disk with serial %q came within %v: %w", serial, limit, errdefs.ErrNotFound)
	case err != nil:
		return "", fmt.Errorf("wait for disk %q: %w", serial, err)
	}
	return node, nil
}

// Writable returns the serials of the disks that can be written, "" for one that has
// none.
func (f Finder) Writable() ([]string, error) {
	sys, _ := f.roots()
	entries, err := os.ReadDir(filepath.Join(sys, "block"))
	if err != nil {
		return nil, fmt.Errorf("list disks: %w", err)
	}
	var serials []string
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(sys, "block", e.Name(), "ro"))
		if errors.Is(err, fs.ErrNotExist) {
			continue // it is just going
		}
		if err != nil {
			return nil, fmt.Errorf("disk %s: %w", e.Name(), err)
		}
		if strings.TrimSpace(string(b)) != "0" {
			continue
		}
		serial, _ := serialOf(sys, e.Name())
		serials = append(serials, serial)
	}
	return serials, nil
}

func (f Finder) roots() (sys, dev string) {
	if f.Sys == "" {
		return "/sys", "/dev"
	}
	return f.Sys, f.Dev
}

func serialOf(sys, name string) (string, error) {
	b, err := os.ReadFile(filepath.Join(sys, "block", name, "serial"))
	return strings.TrimRight(string(b), "\x00\n "), err
}

// DropBuffers drops what the kernel has kept of a disk, whose content the host may have
// exchanged for another since it was read.
func DropBuffers(node string) error {
	f, err := os.Open(node)
	if err != nil {
		return fmt.Errorf("drop the buffers of a disk: %w", err)
	}
	defer f.Close() //nolint:errcheck // only read
	if err := unix.IoctlSetInt(int(f.Fd()), unix.BLKFLSBUF, 0); err != nil {
		return fmt.Errorf("drop the buffers of %s: %w", node, err)
	}
	return nil
}

// find returns "" if the disk is not there.
func (f Finder) find(serial string) (string, error) {
	sys, dev := f.roots()
	entries, err := os.ReadDir(filepath.Join(sys, "block"))
	if err != nil {
		return "", fmt.Errorf("list disks: %w", err)
	}
	for _, e := range entries {
		// Disks of other kinds have no serial, and one may just be going.
		if s, err := serialOf(sys, e.Name()); err != nil || s != serial {
			continue
		}
		node := filepath.Join(dev, e.Name())
		if _, err := os.Stat(node); errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return "", fmt.Errorf("disk %q: %w", serial, err)
		}
		return node, nil
	}
	return "", nil
}
