// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package rootfs

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
)

const (
	// namePrefix begins the names of our leases and views.
	namePrefix = "cloudhv-rootfs-"
	// leaseLabel marks our leases; its value is the store's directory.
	leaseLabel = "io.cloudhv.rootfs"
	// cleanupTimeout bounds the undoing of a view.
	cleanupTimeout = 30 * time.Second
)

// build writes the chain into tmp and gives it its name.
func (s *Store) build(ctx context.Context, c chain, tmp *os.File, bg *background) (retErr error) {
	start := time.Now()
	dir := s.path(c.key, mountSuffix)
	if err := failpoint.At(ctx, failpoint.ImageMountPoint); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make mount point: %w", err)
	}
	defer func() {
		// Remove, not RemoveAll: what is still mounted there is somebody's image.
		if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			retErr = errors.Join(retErr, fmt.Errorf("remove mount point: %w", err))
		}
	}()
	if c.name != "" {
		release, err := s.mountView(ctx, c, dir)
		if err != nil {
			return err
		}
		defer func() { retErr = errors.Join(retErr, release()) }()
	}
	builder := s.cfg.Builder
	if bg != nil {
		builder = bg.builder(builder)
	}
	if err := failpoint.At(ctx, failpoint.ImageWrite); err != nil {
		return err
	}
	if err := write(ctx, builder, dir, tmp, c.key); err != nil {
		return err
	}
	if err := failpoint.At(ctx, failpoint.ImageCommit); err != nil {
		return err
	}
	if err := commit(tmp, s.path(c.key, imageSuffix)); err != nil {
		return err
	}
	log.G(ctx).WithFields(log.Fields{
		"image": c.name, "path": s.path(c.key, imageSuffix), "duration": time.Since(start),
	}).Info("made image file system")
	return nil
}

// write runs mkfs.erofs and looks meanwhile for names that it leaves out.
func write(ctx context.Context, builder Builder, dir string, tmp *os.File, key string) error {
	g, gctx := errgroup.WithContext(ctx)
	var buildErr, findErr error
	g.Go(func() error {
		// Its error does not end the search, which may know the reason.
		buildErr = builder.Run(gctx, dir, tmp.Name(), key)
		return nil
	})
	g.Go(func() error {
		findErr = findSkipped(gctx, dir)
		return findErr
	})
	_ = g.Wait()
	return cmp.Or(findErr, buildErr)
}

// commit makes a written file durable under its name.
func commit(tmp *os.File, path string) error {
	if err := tmp.Sync(); err != nil {
		return fmt.Errorf("sync image: %w", err)
	}
	if err := os.Rename(tmp.Name(), path); err != nil {
		return fmt.Errorf("name image: %w", err)
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("open image directory: %w", err)
	}
	defer dir.Close()
	if err := dir.Sync(); err != nil {
		return fmt.Errorf("sync image directory: %w", err)
	}
	return nil
}

// mountView mounts a read-only view of the chain at dir. The view is under a
// lease of its own, which outlives us by little: the garbage collector removes
// both if we cannot. The returned function unmounts and removes all of it.
func (s *Store) mountView(ctx context.Context, c chain, dir string) (_ func() error, retErr error) {
	sn, err := s.cfg.Snapshotter(c.snapshotter)
	if err != nil {
		return nil, fmt.Errorf("snapshotter %q: %w", c.snapshotter, err)
	}
	ctx = namespaces.WithNamespace(ctx, c.namespace)
	name := namePrefix + rand.Text()
	if err := failpoint.At(ctx, failpoint.ImageLease); err != nil {
		return nil, err
	}
	lease, err := s.cfg.Leases.Create(ctx,
		leases.WithID(name),
		leases.WithLabel(leaseLabel, s.cfg.Dir),
		leases.WithExpiration(s.cfg.Timeout+time.Hour))
	if err != nil {
		return nil, fmt.Errorf("create lease: %w", err)
	}
	release := func() error {
		rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
		defer cancel()
		return errors.Join(unmount(dir), removeView(rctx, sn, name), deleteLease(rctx, s.cfg.Leases, lease))
	}
	defer func() {
		if retErr != nil {
			retErr = errors.Join(retErr, release())
		}
	}()
	if err := failpoint.At(ctx, failpoint.ImageView); err != nil {
		return nil, err
	}
	mounts, err := sn.View(leases.WithLease(ctx, lease.ID), name, c.name)
	if err != nil {
		return nil, fmt.Errorf("view snapshot %q: %w", c.name, err)
	}
	if err := failpoint.At(ctx, failpoint.ImageMount); err != nil {
		return nil, err
	}
	if err := mount.All(mounts, dir); err != nil {
		return nil, fmt.Errorf("mount a view of snapshot %q: %w", c.name, err)
	}
	return release, nil
}

func removeView(ctx context.Context, sn snapshots.Snapshotter, name string) error {
	if err := sn.Remove(ctx, name); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("remove view %s: %w", name, err)
	}
	return nil
}

func deleteLease(ctx context.Context, lm leases.Manager, lease leases.Lease) error {
	if err := lm.Delete(ctx, lease); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("delete lease %s: %w", lease.ID, err)
	}
	return nil
}

// unmount unmounts everything at dir; what is not mounted is no error. A
// reader that is left keeps its files, not the mount point.
func unmount(dir string) error {
	if err := mount.UnmountAll(dir, unix.UMOUNT_NOFOLLOW); err == nil {
		return nil
	}
	if err := mount.UnmountAll(dir, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return nil
}

const (
	// skippedName begins the names that mkfs.erofs leaves out, at every level.
	skippedName = "lost+found"
	// maxName is the longest name that mkfs.erofs 1.5 can write, one byte less
	// than the kernel takes.
	maxName = 254
)

// findSkipped returns ErrNotImplemented if the tree has a file that mkfs.erofs
// would leave out or cannot write. An empty directory of that name, which is what a tree copied
// from an ext4 disk has, is let go with a warning.
func findSkipped(ctx context.Context, root string) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return fmt.Errorf("read image: %w", err)
		}
		if d.IsDir() && ctx.Err() != nil {
			return fmt.Errorf("read image: %w", context.Cause(ctx))
		}
		if path == root || !strings.HasPrefix(d.Name(), skippedName) && len(d.Name()) <= maxName {
			return nil
		}
		rel := "/" + strings.TrimPrefix(strings.TrimPrefix(path, root), "/")
		if len(d.Name()) > maxName {
			return fmt.Errorf("mkfs.erofs cannot write %s, as its name is longer than %d bytes: %w", rel, maxName, errdefs.ErrNotImplemented)
		}
		if d.IsDir() && d.Name() == skippedName {
			entries, err := os.ReadDir(path)
			if err != nil {
				return fmt.Errorf("read image: %w", err)
			}
			if len(entries) == 0 {
				log.G(ctx).WithField("path", rel).Warn("an empty lost+found directory of the image is left out")
				return nil
			}
		}
		return fmt.Errorf("mkfs.erofs leaves out %s, as its name begins with %s: %w", rel, skippedName, errdefs.ErrNotImplemented)
	})
}
