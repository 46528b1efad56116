// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package blockdev finds, checks and opens block devices of the host, and files that
// stand for some, by nodes of its own: the host's are neither needed nor changed.
package blockdev

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Number is what a block device is known by on its host.
type Number struct {
	Major, Minor uint32
}

// Bounds of the kernel's numbers.
const (
	MaxMajor = 1<<12 - 1
	MaxMinor = 1<<20 - 1
)

func (n Number) String() string { return fmt.Sprintf("%d:%d", n.Major, n.Minor) }

func (n Number) dev() uint64 { return unix.Mkdev(n.Major, n.Minor) }

// Source is a block device to be opened by others, by Path. Its owner calls Close when
// they have: Path is gone then, and what nobody has open may be, too.
type Source struct {
	Number
	// Path is a node of the device, which only this process's user may open.
	Path string
	// ReadOnly is true for a device that cannot be written to.
	ReadOnly bool
	// held keeps what would end with its last user.
	held *os.File
}

// Close removes the node.
func (s *Source) Close() error {
	err := os.Remove(s.Path)
	if s.held != nil {
		err = errors.Join(err, s.held.Close())
	}
	return err
}

// Nodes makes nodes of devices in a directory of its own. Its methods may be called
// concurrently.
type Nodes struct {
	dir  string
	last atomic.Uint64
}

// NewNodes takes a directory, which is made if it is missing. Nodes in it that an earlier
// process left are of no use to anybody: see Clear.
func NewNodes(dir string) *Nodes { return &Nodes{dir: dir} }

// Clear removes all nodes. There must be no Source.
func (n *Nodes) Clear() error {
	if err := errors.Join(os.RemoveAll(n.dir), os.MkdirAll(n.dir, 0o700)); err != nil {
		return fmt.Errorf("make room for nodes of block devices: %w", err)
	}
	return nil
}

// Open finds the block device with a number. It returns ErrInvalidArgument if the host
// has none.
func (n *Nodes) Open(number Number) (*Source, error) {
	if number.Major > MaxMajor || number.Minor > MaxMinor {
		return nil, fmt.Errorf("block device %s: want numbers up to %d:%d: %w", number, MaxMajor, MaxMinor, errdefs.ErrInvalidArgument)
	}
	path, err := n.node(number)
	if err != nil {
		return nil, fmt.Errorf("block device %s: %w", number, err)
	}
	s := &Source{Number: number, Path: path}
	s.ReadOnly, err = readOnly(path)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("block device %s: %w", number, err), os.Remove(path))
	}
	return s, nil
}

// node makes a node.
func (n *Nodes) node(number Number) (string, error) {
	if err := os.MkdirAll(n.dir, 0o700); err != nil {
		return "", err
	}
	if err := Usable(n.dir); err != nil {
		return "", err
	}
	path := filepath.Join(n.dir, strconv.FormatUint(n.last.Add(1), 10))
	if err := unix.Mknod(path, unix.S_IFBLK|0o600, int(number.dev())); err != nil {
		return "", fmt.Errorf("make a node of it: %w", err)
	}
	return path, nil
}

// Usable says whether devices can be opened by nodes in a directory. The error wraps
// ErrFailedPrecondition.
func Usable(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	if st.Flags&unix.MS_NODEV != 0 {
		return fmt.Errorf("%s is on a file system that is mounted with nodev, by which no device can be opened: want one without (cache_dir): %w",
			dir, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// readOnly opens a device and tells whether it can only be read.
func readOnly(path string) (bool, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV) {
		return false, fmt.Errorf("the host has no such device: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return false, fmt.Errorf("open it: %w", errors.Join(err, errdefs.ErrFailedPrecondition))
	}
	defer f.Close() //nolint:errcheck // only read
	ro, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKROGET)
	if err != nil {
		return false, fmt.Errorf("ask whether it can be written to: %w", err)
	}
	return ro != 0, nil
}

// InUse says whether somebody on the host claims the device for himself, as a mount
// does. The error wraps ErrFailedPrecondition.
func (s *Source) InUse() error {
	f, err := os.OpenFile(s.Path, os.O_RDONLY|unix.O_EXCL|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("block device %s is in use on the host, such as by a mount: %w", s.Number, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return fmt.Errorf("block device %s: %w", s.Number, err)
	}
	return f.Close()
}

// numberOf reads a device's number from sysfs.
func numberOf(name string) (n Number, _ error) {
	text, err := os.ReadFile(filepath.Join("/sys/block", name, "dev"))
	if err != nil {
		return n, err
	}
	if _, err := fmt.Sscanf(string(text), "%d:%d", &n.Major, &n.Minor); err != nil {
		return n, fmt.Errorf("number of %s: %w", name, err)
	}
	return n, nil
}

// Found is a block device or a file that a path leads to.
type Found struct {
	file *os.File
	// Path is where it is, whatever links led there.
	Path string
	// Device is true for a block device, and Number its.
	Device bool
	Number Number
	dev    uint64
	ino    uint64
}

// Find follows a path to what it names, and keeps hold of that: whoever changes a link or
// a name afterwards changes nothing. The caller closes it. What is neither block device nor
// regular file is an ErrInvalidArgument, and what is not there an ErrNotFound.
func Find(path string) (_ *Found, retErr error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	f := &Found{file: os.NewFile(uintptr(fd), path)}
	defer func() {
		if retErr != nil {
			_ = f.Close()
		}
	}()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	f.dev, f.ino = st.Dev, st.Ino
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFBLK:
		f.Device, f.Number = true, Number{unix.Major(st.Rdev), unix.Minor(st.Rdev)}
	case unix.S_IFREG:
		const sector = 512
		if st.Size == 0 || st.Size%sector != 0 {
			return nil, fmt.Errorf("the file has %d bytes: want a multiple of %d: %w", st.Size, sector, errdefs.ErrInvalidArgument)
		}
	default:
		return nil, fmt.Errorf("it is no block device and no regular file: %w", errdefs.ErrInvalidArgument)
	}
	if f.Path, err = os.Readlink(f.self()); err != nil {
		return nil, err
	}
	return f, nil
}

func (f *Found) self() string { return "/proc/self/fd/" + strconv.Itoa(int(f.file.Fd())) }

// Close lets go of it.
func (f *Found) Close() error { return f.file.Close() }

// Identity is the same for all names of one device, or file.
func (f *Found) Identity() string {
	if f.Device {
		return "device " + f.Number.String()
	}
	return fmt.Sprintf("file %d on %d:%d", f.ino, unix.Major(f.dev), unix.Minor(f.dev))
}

// Source makes a source of it. A file becomes a loop device, which the kernel takes away
// when nobody has it open any more.
func (f *Found) Source(nodes *Nodes, readOnly bool) (*Source, error) {
	if f.Device {
		return nodes.Open(f.Number)
	}
	return f.loop(nodes, readOnly)
}
