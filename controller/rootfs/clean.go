// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package rootfs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/log"
)

// Clean removes what an earlier process left when it ended in the middle:
// mounted views, unfinished files, leases. Pinned images and what another
// process is making stay. Call it before the first Get.
func (s *Store) Clean(ctx context.Context, containerdNamespaces []string) error {
	var errs []error
	entries, err := os.ReadDir(s.cfg.Dir)
	if err != nil {
		return fmt.Errorf("read image directory: %w", err)
	}
	left := map[string]bool{}
	for _, e := range entries {
		for _, suffix := range []string{tmpSuffix, mountSuffix} {
			if key, ok := strings.CutSuffix(e.Name(), suffix); ok {
				left[key] = true
			}
		}
	}
	for key := range left {
		errs = append(errs, s.cleanTemporary(key))
	}
	for _, ns := range containerdNamespaces {
		errs = append(errs, s.cleanLeases(namespaces.WithNamespace(ctx, ns)))
	}
	return errors.Join(errs...)
}

// cleanTemporary removes an unfinished image and its mounted view, unless its
// writer lives. A view may also be left of an image that was finished: it is
// removed under the lock that a new writer would need.
func (s *Store) cleanTemporary(key string) error {
	f, err := os.OpenFile(s.path(key, tmpSuffix), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("open unfinished image: %w", err)
	}
	defer f.Close()
	if err := tryFlock(f); errors.Is(err, errBusy) {
		return nil
	} else if err != nil {
		return err
	}
	if same, err := isAt(f, f.Name()); err != nil || !same {
		return err // its writer has finished meanwhile
	}
	dir := s.path(key, mountSuffix)
	if _, err := os.Lstat(dir); err == nil {
		if err := errors.Join(unmount(dir), removeFile(dir)); err != nil {
			return fmt.Errorf("remove the view of an image: %w", err)
		}
	}
	return removeFile(f.Name())
}

// cleanLeases removes our leases in a namespace, and the views they hold.
func (s *Store) cleanLeases(ctx context.Context) error {
	list, err := s.cfg.Leases.List(ctx, fmt.Sprintf("labels.%q==%q", leaseLabel, s.cfg.Dir))
	if err != nil {
		return fmt.Errorf("list leases: %w", err)
	}
	var errs []error
	for _, lease := range list {
		if !strings.HasPrefix(lease.ID, namePrefix) || lease.Labels[leaseLabel] != s.cfg.Dir {
			continue
		}
		errs = append(errs, s.cleanViews(ctx, lease), deleteLease(ctx, s.cfg.Leases, lease))
	}
	return errors.Join(errs...)
}

func (s *Store) cleanViews(ctx context.Context, lease leases.Lease) error {
	resources, err := s.cfg.Leases.ListResources(ctx, lease)
	if err != nil {
		return fmt.Errorf("list what lease %s holds: %w", lease.ID, err)
	}
	var errs []error
	for _, r := range resources {
		name, ok := strings.CutPrefix(r.Type, "snapshots/")
		if !ok || r.ID != lease.ID {
			continue
		}
		sn, err := s.cfg.Snapshotter(name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, removeView(ctx, sn, r.ID))
	}
	return errors.Join(errs...)
}

// Forget removes the images that no snapshot stands behind any more and that
// nobody has pinned. Snapshotters names those to look in.
func (s *Store) Forget(ctx context.Context, containerdNamespaces, snapshotters []string) error {
	// What is made while we look belongs to a snapshot that we may not see.
	start := time.Now()
	known := map[string]bool{emptyKey: true}
	for _, ns := range containerdNamespaces {
		for _, name := range snapshotters {
			sn, err := s.cfg.Snapshotter(name)
			if err != nil {
				return fmt.Errorf("snapshotter %q: %w", name, err)
			}
			err = sn.Walk(namespaces.WithNamespace(ctx, ns), func(_ context.Context, info snapshots.Info) error {
				if info.Kind == snapshots.KindCommitted {
					known[chainKey(ns, name, info)] = true
				}
				return nil
			})
			if err != nil {
				return fmt.Errorf("list snapshots of %s: %w", name, err)
			}
		}
	}
	images, err := s.images()
	if err != nil {
		return err
	}
	var errs []error
	for _, img := range images {
		if !known[img.key] && img.used.Before(start) {
			errs = append(errs, s.remove(ctx, img, "no snapshot stands behind it"))
		}
	}
	return errors.Join(errs...)
}

// trim removes the images that were not used for longest until those that
// nobody uses fit the limit.
func (s *Store) trim(ctx context.Context) {
	images, err := s.images()
	if err != nil {
		log.G(ctx).WithError(err).Warn("cannot trim the image cache")
		return
	}
	var total int64
	for _, img := range images {
		total += img.size
	}
	slices.SortFunc(images, func(a, b imageFile) int { return cmp.Compare(a.used.UnixNano(), b.used.UnixNano()) })
	for _, img := range images {
		if total <= s.cfg.CacheLimit {
			return
		}
		if err := s.remove(ctx, img, "the cache is full"); err != nil {
			log.G(ctx).WithError(err).Warn("cannot trim the image cache")
		}
		total -= img.size
	}
}

type imageFile struct {
	key  string
	size int64
	used time.Time
}

// images lists the whole images that nobody has pinned.
func (s *Store) images() ([]imageFile, error) {
	entries, err := os.ReadDir(s.cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("read image directory: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var images []imageFile
	for _, e := range entries {
		key, ok := strings.CutSuffix(e.Name(), imageSuffix)
		if !ok || s.pins[key] > 0 || len(key) != keyLen {
			continue
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read image directory: %w", err)
		}
		images = append(images, imageFile{key: key, size: info.Size(), used: info.ModTime()})
	}
	return images, nil
}

// remove removes an image unless it has been pinned meanwhile.
func (s *Store) remove(ctx context.Context, img imageFile, why string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pins[img.key] > 0 {
		return nil
	}
	if err := removeFile(s.path(img.key, imageSuffix)); err != nil {
		return fmt.Errorf("remove image: %w", err)
	}
	log.G(ctx).WithFields(log.Fields{"image": img.key, "reason": why}).Info("removed image file system")
	return nil
}
