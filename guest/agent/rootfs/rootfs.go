// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package rootfs makes the containers' root file systems: an overlay whose lower
// layer is an image's disk, mounted once, and whose upper layer lies on the VM's
// scratch disk.
package rootfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/disk"
)

// diskLimit is how long an image's disk may take to appear: the host plugs it
// before it asks for the container.
const diskLimit = 30 * time.Second

// Config says where things are. All paths are absolute.
type Config struct {
	// Images holds a mount point for each image.
	Images string
	// Layers is a directory on the scratch disk for what containers write.
	Layers string
	// Disks finds the images' disks.
	Disks disk.Finder
	// Quota says that Layers' file system accounts by project.
	Quota bool
}

// Manager makes and removes root file systems. Its methods may be called
// concurrently, for one container by one caller at a time.
type Manager struct {
	cfg   Config
	trash *trash

	mu     sync.Mutex
	images map[string]*image
	// project is the last project ID given away.
	project uint32
}

// image is one image's mount; mu is held while it is being made.
type image struct {
	mu      sync.Mutex
	mounted bool
	// users are the callers that hold this entry; under Manager.mu.
	users int
}

// NewManager makes a manager and the directories of cfg.
func NewManager(cfg Config) (*Manager, error) {
	for _, d := range []string{cfg.Images, cfg.Layers} {
		if err := os.MkdirAll(d, 0o711); err != nil {
			return nil, fmt.Errorf("prepare root file systems: %w", err)
		}
	}
	t, err := newTrash(filepath.Join(cfg.Layers, "trash"))
	if err != nil {
		return nil, err
	}
	return &Manager{cfg: cfg, trash: t, images: make(map[string]*image)}, nil
}

// Layer is a container's root file system. Its owner calls Remove.
type Layer struct {
	m *Manager
	// target is the mount point, dir the container's directory on scratch.
	target, dir string
	project     uint32
	usage       usageCache
}

// Mount mounts the root file system of container id at target, which exists, on
// the image with that disk serial. After a failure nothing is left of it but the
// image's own mount.
//
// With a user namespace its files belong to whom they belong in the image, as seen in the
// namespace: the image's mount is ID-mapped, and what is written is stored with the IDs
// of the VM. All calls have the same one, as the pod has one.
func (m *Manager) Mount(ctx context.Context, id, serial, target string, userns *os.File) (*Layer, error) {
	lower, err := m.image(ctx, serial, userns)
	if err != nil {
		return nil, err
	}
	return m.mount(lower, id, target)
}

// Image mounts the image with that disk serial, for a Mount that follows, unless it is
// mounted.
func (m *Manager) Image(ctx context.Context, serial string, userns *os.File) error {
	_, err := m.image(ctx, serial, userns)
	return err
}

// Forget unmounts an image that no container uses, so that its disk can be taken
// away. One that is not mounted is no error.
func (m *Manager) Forget(serial string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	img := m.images[serial]
	if img == nil {
		return nil
	}
	if img.users > 0 {
		return fmt.Errorf("image %s is being mounted: %w", serial, errdefs.ErrFailedPrecondition)
	}
	target := filepath.Join(m.cfg.Images, serial)
	if err := unix.Unmount(target, 0); err != nil {
		return fmt.Errorf("unmount image %s: %w", serial, err)
	}
	delete(m.images, serial)
	return os.Remove(target)
}

func (m *Manager) mount(lower, id, target string) (_ *Layer, retErr error) {
	l := &Layer{m: m, target: target, dir: filepath.Join(m.cfg.Layers, id)}
	if err := os.Mkdir(l.dir, 0o711); err != nil {
		return nil, fmt.Errorf("make writable layer: %w", err)
	}
	defer func() {
		if retErr != nil {
			retErr = errors.Join(retErr, m.trash.remove(l.dir))
		}
	}()
	if m.cfg.Quota {
		l.project = m.nextProject()
		if err := setProject(l.dir, l.project); err != nil {
			return nil, fmt.Errorf("account writable layer: %w", err)
		}
	}
	if err := l.directories(lower); err != nil {
		return nil, err
	}
	// volatile: nothing here outlives the VM, so fsync need not reach the disk.
	data := "lowerdir=" + lower + ",upperdir=" + l.upper() + ",workdir=" + l.work() + ",index=off,volatile"
	if err := unix.Mount("overlay", target, "overlay", 0, data); err != nil {
		return nil, fmt.Errorf("mount overlay at %s: %w", target, err)
	}
	return l, nil
}

func (l *Layer) upper() string { return filepath.Join(l.dir, "upper") }
func (l *Layer) work() string  { return filepath.Join(l.dir, "work") }

// directories makes upper and work. The upper's root is the container's "/":
// it gets the mode and owner that the image's has.
func (l *Layer) directories(lower string) error {
	for _, d := range []string{l.upper(), l.work()} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return fmt.Errorf("make writable layer: %w", err)
		}
	}
	var st unix.Stat_t
	if err := unix.Stat(lower, &st); err != nil {
		return fmt.Errorf("image root: %w", err)
	}
	err := errors.Join(unix.Chown(l.upper(), int(st.Uid), int(st.Gid)), unix.Chmod(l.upper(), st.Mode&0o7777))
	if err != nil {
		return fmt.Errorf("own writable layer: %w", err)
	}
	return nil
}

// Remove unmounts the root file system and removes what the container wrote:
// at once from view, and from the disk in the background. It may be repeated.
func (l *Layer) Remove() error {
	err := unix.Unmount(l.target, 0)
	if errors.Is(err, unix.EBUSY) {
		// A process of the pod's may hold a file; the mount goes with it.
		err = unix.Unmount(l.target, unix.MNT_DETACH)
	}
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", l.target, err)
	}
	return l.m.trash.remove(l.dir)
}

// image mounts an image's disk, once, and returns where. The mount stays as
// long as the VM: other containers will want it.
func (m *Manager) image(ctx context.Context, serial string, userns *os.File) (string, error) {
	if !disk.ValidSerial(serial) {
		return "", fmt.Errorf("image serial %q: want 1 to %d of [a-z0-9-]: %w", serial, disk.MaxSerial, errdefs.ErrInvalidArgument)
	}
	m.mu.Lock()
	img := m.images[serial]
	if img == nil {
		img = &image{}
		m.images[serial] = img
	}
	img.users++
	m.mu.Unlock()

	img.mu.Lock()
	defer img.mu.Unlock()
	defer func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		img.users--
		if img.users == 0 && !img.mounted {
			delete(m.images, serial)
		}
	}()
	target := filepath.Join(m.cfg.Images, serial)
	if img.mounted {
		return target, nil
	}
	if err := m.mountImage(ctx, serial, target, userns); err != nil {
		return "", err
	}
	img.mounted = true
	return target, nil
}

func (m *Manager) mountImage(ctx context.Context, serial, target string, userns *os.File) error {
	node, err := m.cfg.Disks.Wait(ctx, serial, diskLimit)
	if err != nil {
		return fmt.Errorf("image disk: %w", err)
	}
	if err := disk.DropBuffers(node); err != nil {
		return fmt.Errorf("image disk: %w", err)
	}
	if err := os.MkdirAll(target, 0o711); err != nil {
		return fmt.Errorf("image mount point: %w", err)
	}
	if err := unix.Mount(node, target, "erofs", unix.MS_RDONLY, ""); err != nil {
		return errors.Join(fmt.Errorf("mount image %s from %s: %w", serial, node, err), os.Remove(target))
	}
	if userns == nil {
		return nil
	}
	if err := mapIDs(target, int(userns.Fd())); err != nil {
		return errors.Join(fmt.Errorf("map the IDs of image %s: %w", serial, err), unix.Unmount(target, unix.MNT_DETACH), os.Remove(target))
	}
	return nil
}

// mapIDs makes an ID-mapped mount of the one at target. The kernel maps one that is
// mounted nowhere only.
func mapIDs(target string, userns int) error {
	fd, err := unix.OpenTree(unix.AT_FDCWD, target, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("clone the mount: %w", err)
	}
	defer unix.Close(fd) //nolint:errcheck // of a mount there is nothing to write back
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(userns)}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return fmt.Errorf("set the mount's attributes: %w", err)
	}
	if err := unix.Unmount(target, 0); err != nil {
		return fmt.Errorf("unmount the other: %w", err)
	}
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount it: %w", err)
	}
	return nil
}

func (m *Manager) nextProject() uint32 {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.project++
	return m.project
}

// trash removes trees in the background, one after another: a writable layer of
// a million files must not hold up the answer to a delete.
type trash struct {
	dir string

	mu   sync.Mutex
	next uint64
	busy bool
}

func newTrash(dir string) (*trash, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("prepare removal of layers: %w", err)
	}
	return &trash{dir: dir}, nil
}

// remove takes path away; a path that is not there is no error. Space comes back
// a little later.
func (t *trash) remove(path string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.next++
	err := unix.Rename(path, filepath.Join(t.dir, strconv.FormatUint(t.next, 10)))
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove layer: %w", err)
	}
	if !t.busy {
		t.busy = true
		go t.empty()
	}
	return nil
}

// empty removes all there is, and ends when there is no more.
func (t *trash) empty() {
	for {
		t.mu.Lock()
		entries, err := os.ReadDir(t.dir)
		if err != nil || len(entries) == 0 {
			t.busy = false
			t.mu.Unlock()
			return
		}
		t.mu.Unlock()
		failed := 0
		for _, e := range entries {
			if err := os.RemoveAll(filepath.Join(t.dir, e.Name())); err != nil {
				failed++
			}
		}
		if failed == len(entries) {
			// What cannot be removed now is tried again with the next layer.
			t.mu.Lock()
			t.busy = false
			t.mu.Unlock()
			return
		}
	}
}
