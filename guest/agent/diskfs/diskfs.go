// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package diskfs mounts the file systems of disks that the host has given the VM for its
// containers, each once.
package diskfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/disk"
	"github.com/cloudhv/containerd-cloudhv/guest/api"
)

const (
	// diskLimit is how long a disk may take to appear.
	diskLimit = 30 * time.Second
	// freeLimit is how long mount namespaces of processes that have ended may keep a file
	// system, and freePause between two looks: nothing tells when the last has gone.
	freeLimit = 10 * time.Second
	freePause = 5 * time.Millisecond
)

// Volume is a disk with a file system.
type Volume struct {
	// Serial is the disk's, FSType one of api.DiskFileSystems, and Options some of
	// api.DiskMountOptions.
	Serial, FSType string
	Options        []string
	ReadOnly       bool
}

// Manager mounts volumes. Its methods may be called concurrently.
type Manager struct {
	root  string
	disks disk.Finder

	mu      sync.Mutex
	volumes map[string]*volume
}

// volume is one that is mounted, or is being mounted or unmounted by who holds mu.
type volume struct {
	mu      sync.Mutex
	as      Volume
	node    string
	mounted bool
	// users are those that have it, by name, with what is bound for each.
	users map[string][]string
}

// NewManager makes a manager with its mounts in root, a directory that is made when it is
// needed.
func NewManager(root string, disks disk.Finder) *Manager {
	return &Manager{root: root, disks: disks, volumes: make(map[string]*volume)}
}

// Use mounts a volume for a user, unless it is mounted, and waits for its disk. Release is
// to follow, after an error too.
func (m *Manager) Use(ctx context.Context, user string, v Volume) error {
	flags, data, err := v.options()
	if err != nil {
		return err
	}
	vol := m.volume(v.Serial)
	vol.mu.Lock()
	defer vol.mu.Unlock()
	if vol.mounted {
		if vol.as.FSType != v.FSType || vol.as.ReadOnly != v.ReadOnly || !slices.Equal(vol.as.Options, v.Options) {
			return fmt.Errorf("disk %s is mounted as %+v, not %+v: %w", v.Serial, vol.as, v, errdefs.ErrInvalidArgument)
		}
		vol.users[user] = append([]string{}, vol.users[user]...)
		return nil
	}
	node, err := m.disks.Wait(ctx, v.Serial, diskLimit)
	if err != nil {
		return err
	}
	target := m.target(v.Serial)
	if err := os.MkdirAll(target, 0o711); err != nil {
		return fmt.Errorf("mount disk %s: %w", v.Serial, err)
	}
	if err := unix.Mount(node, target, v.FSType, flags, data); err != nil {
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EUCLEAN) {
			err = fmt.Errorf("%w: want a file system of that type, without damage: %w", err, errdefs.ErrInvalidArgument)
		}
		return errors.Join(fmt.Errorf("mount disk %s as %s: %w", v.Serial, v.FSType, err), os.Remove(target))
	}
	vol.as, vol.node, vol.mounted, vol.users = v, node, true, map[string][]string{user: {}}
	return nil
}

func (m *Manager) volume(serial string) *volume {
	m.mu.Lock()
	defer m.mu.Unlock()
	vol := m.volumes[serial]
	if vol == nil {
		vol = &volume{users: make(map[string][]string)}
		m.volumes[serial] = vol
	}
	return vol
}

func (m *Manager) target(serial string) string { return filepath.Join(m.root, serial) }

// options are the mount's flags, and what else its file system is told.
func (v Volume) options() (flags uintptr, data string, _ error) {
	if !disk.ValidSerial(v.Serial) {
		return 0, "", fmt.Errorf("disk serial %q: want 1 to %d of [a-z0-9-]: %w", v.Serial, disk.MaxSerial, errdefs.ErrInvalidArgument)
	}
	if !slices.Contains(api.DiskFileSystems, v.FSType) {
		return 0, "", fmt.Errorf("file system %q of disk %s: want one of %s: %w",
			v.FSType, v.Serial, strings.Join(api.DiskFileSystems, ", "), errdefs.ErrInvalidArgument)
	}
	// A node of a device in it would lead to another disk of the VM.
	flags = unix.MS_NODEV
	if v.ReadOnly {
		flags |= unix.MS_RDONLY
	}
	for _, o := range v.Options {
		switch flag, ok := mountFlags[o]; {
		case ok:
			flags |= flag
		case o == "discard" && v.FSType != "erofs":
			data = o
		default:
			return 0, "", fmt.Errorf("option %q of disk %s (%s): want some of %s: %w",
				o, v.Serial, v.FSType, strings.Join(api.DiskMountOptions, ", "), errdefs.ErrInvalidArgument)
		}
	}
	return flags, data, nil
}

var mountFlags = map[string]uintptr{
	"noatime": unix.MS_NOATIME, "nodiratime": unix.MS_NODIRATIME, "relatime": unix.MS_RELATIME, "strictatime": unix.MS_STRICTATIME,
	"nosuid": unix.MS_NOSUID, "noexec": unix.MS_NOEXEC, "sync": unix.MS_SYNCHRONOUS,
}

// Bind mounts what is at a path in a volume that a user has at target, which it makes. No
// link in it leads out of the volume. With a user namespace the files belong inside to whom
// they belong on the disk.
func (m *Manager) Bind(user, serial, path, target string, userns *os.File) error {
	vol := m.volume(serial)
	vol.mu.Lock()
	defer vol.mu.Unlock()
	if _, ok := vol.users[user]; !ok {
		return fmt.Errorf("disk %s is none of %s's: %w", serial, user, errdefs.ErrInvalidArgument)
	}
	if err := bind(m.target(serial), path, target, userns); err != nil {
		return fmt.Errorf("%q on disk %s: %w", path, serial, err)
	}
	vol.users[user] = append(vol.users[user], target)
	return nil
}

func bind(root, path, target string, userns *os.File) error {
	top, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(top) //nolint:errcheck // a path
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV}
	found, err := unix.Openat2(top, "./"+path, &how)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	if err != nil {
		return err
	}
	defer unix.Close(found) //nolint:errcheck // a path
	if err := makeTarget(found, target); err != nil {
		return err
	}
	tree, err := unix.OpenTree(found, "", unix.AT_EMPTY_PATH|unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("clone the mount: %w", err)
	}
	defer unix.Close(tree) //nolint:errcheck // of a mount there is nothing to write back
	if userns != nil {
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(userns.Fd())}
		if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
			return fmt.Errorf("map the IDs: %w", err)
		}
	}
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount it: %w", err)
	}
	return nil
}

// makeTarget makes a place for a mount of a file or directory.
func makeTarget(found int, target string) error {
	var st unix.Stat_t
	if err := unix.Fstat(found, &st); err != nil {
		return err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return os.MkdirAll(target, 0o711)
	case unix.S_IFREG:
		if err := os.MkdirAll(filepath.Dir(target), 0o711); err != nil {
			return err
		}
		return os.WriteFile(target, nil, 0o600)
	default:
		return fmt.Errorf("want a directory or a file: %w", errdefs.ErrInvalidArgument)
	}
}

// Release takes from a user what Use and Bind have given it. A volume that nobody else has
// is written back and unmounted: its disk can be taken away, and everything is on it. It may
// be repeated.
func (m *Manager) Release(ctx context.Context, user string) error {
	var errs []error
	for _, vol := range m.all() {
		errs = append(errs, m.release(ctx, vol, user))
	}
	return errors.Join(errs...)
}

// Close takes all volumes from all.
func (m *Manager) Close(ctx context.Context) error {
	var errs []error
	for _, vol := range m.all() {
		for _, user := range vol.allUsers() {
			errs = append(errs, m.release(ctx, vol, user))
		}
	}
	return errors.Join(errs...)
}

func (m *Manager) all() []*volume {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := make([]*volume, 0, len(m.volumes))
	for _, vol := range m.volumes {
		all = append(all, vol)
	}
	return all
}

func (vol *volume) allUsers() []string {
	vol.mu.Lock()
	defer vol.mu.Unlock()
	var users []string
	for user := range vol.users {
		users = append(users, user)
	}
	return users
}

func (m *Manager) release(ctx context.Context, vol *volume, user string) error {
	vol.mu.Lock()
	defer vol.mu.Unlock()
	bound, ok := vol.users[user]
	if !ok {
		return nil
	}
	for _, target := range bound {
		if err := unmount(target); err != nil {
			return err
		}
	}
	if len(vol.users) > 1 {
		delete(vol.users, user)
		return nil
	}
	target := m.target(vol.as.Serial)
	if err := syncFS(target); err != nil {
		// The disk may fail; whoever wrote has been told, or will be.
		log.G(ctx).WithError(err).WithField("disk", vol.as.Serial).Error("cannot write back a volume")
	}
	if err := unmount(target); err != nil {
		return err
	}
	delete(vol.users, user)
	vol.mounted = false
	if err := awaitFree(ctx, vol.node); err != nil {
		log.G(ctx).WithError(err).WithField("disk", vol.as.Serial).Warn("a volume that was unmounted is in use all the same; it was written back before")
	}
	return os.Remove(target)
}

func unmount(target string) error {
	err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EBUSY) {
		err = unix.Unmount(target, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
	}
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", target, err)
	}
	return nil
}

func syncFS(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // only read
	return unix.Syncfs(int(f.Fd()))
}

// awaitFree waits until no mount has a disk, in any namespace: the file system is then
// complete on it. As long as one has, the kernel lets nobody claim the disk.
func awaitFree(ctx context.Context, node string) error {
	for end := time.Now().Add(freeLimit); ; {
		f, err := os.OpenFile(node, os.O_RDONLY|unix.O_EXCL, 0)
		if err == nil {
			return f.Close()
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
			return err
		}
		timer := time.NewTimer(freePause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return errors.Join(err, ctx.Err())
		}
	}
}
