// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package rootfs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// backgroundNiceness is the child's as long as no pod waits for its image.
	backgroundNiceness = 19
	// runAtLeast is how long the child goes on after it has given way: under a
	// steady stream of pods its image must be made too.
	runAtLeast = 2 * time.Second
)

// Turns lets those go first who are waited for.
type Turns interface {
	// Yield waits while there are any, for a limited time.
	Yield(ctx context.Context)
	// Taken waits until there are; false if ctx ends before.
	Taken(ctx context.Context) bool
}

// background is the making of an image that no pod has asked for yet.
type background struct {
	turns Turns
	// limit bounds the file, in bytes.
	limit int64
	// urgent ends when a pod waits for the image; hurry ends it.
	urgent context.Context
	hurry  context.CancelFunc
}

// Prebuild makes the image of src, here a committed snapshot, before a pod asks for
// it. Call it from one goroutine. It lets others take their turns, and makes room
// only of images that nobody has used since the given time, so that it never
// exceeds the cache's limit. A pod that asks meanwhile joins, and the making is
// then as urgent as if the pod had begun it. When ctx ends, the making ends.
//
// ErrAlreadyExists means that there is an image, ErrResourceExhausted that it does
// not fit, ErrNotFound that the snapshot is gone.
func (s *Store) Prebuild(ctx context.Context, src Source, since time.Time, turns Turns) error {
	turns.Yield(ctx)
	c, err := s.committed(ctx, src)
	if err != nil {
		return err
	}
	if s.exists(c.key) {
		return fmt.Errorf("image of %s: %w", c.name, errdefs.ErrAlreadyExists)
	}
	size, err := s.chainSize(ctx, c)
	if err != nil {
		return err
	}
	b := &background{turns: turns}
	if b.limit, err = s.makeRoom(ctx, size, since); err != nil {
		return err
	}
	b.urgent, b.hurry = context.WithCancel(context.WithoutCancel(ctx))
	defer b.hurry()
	s.setBackground(c.key, b)
	defer s.setBackground(c.key, nil)
	r := <-s.flight.DoChan(c.key, func() (any, error) {
		if s.exists(c.key) {
			return flight{}, nil
		}
		bctx, cancel := context.WithTimeout(ctx, s.cfg.Timeout)
		defer cancel()
		pin := s.Pin(c.key)
		defer pin.Release()
		return flight{background: true}, s.make(bctx, c, b)
	})
	// Others may have let go of images meanwhile.
	s.trim(ctx)
	if f, ok := r.Val.(flight); r.Err == nil && ok && !f.background {
		return fmt.Errorf("image of %s: %w", c.name, errdefs.ErrAlreadyExists) // a pod's
	}
	return r.Err
}

// Has tells whether there is an image of src, a committed snapshot, or returns
// ErrNotFound if there is no such snapshot.
func (s *Store) Has(ctx context.Context, src Source) (bool, error) {
	c, err := s.committed(ctx, src)
	return err == nil && s.exists(c.key), err
}

// flight is what a making of an image tells those who joined it.
type flight struct {
	// background is true if it was no pod's, and had limits of its own.
	background bool
}

func (s *Store) setBackground(key string, b *background) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b == nil {
		delete(s.background, key)
		return
	}
	s.background[key] = b
}

// hurry makes the making of an image urgent, if nobody has waited for it so far.
func (s *Store) hurry(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b := s.background[key]; b != nil {
		b.hurry()
	}
}

// committed finds the chain whose topmost snapshot src names.
func (s *Store) committed(ctx context.Context, src Source) (chain, error) {
	sn, err := s.cfg.Snapshotter(src.Snapshotter)
	if err != nil {
		return chain{}, fmt.Errorf("snapshotter %q: %w", src.Snapshotter, err)
	}
	info, err := sn.Stat(namespaces.WithNamespace(ctx, src.Namespace), src.Key)
	if err != nil {
		return chain{}, fmt.Errorf("snapshot %q of %s: %w", src.Key, src.Snapshotter, err)
	}
	if info.Kind != snapshots.KindCommitted {
		return chain{}, fmt.Errorf("snapshot %q of %s is not committed: %w", src.Key, src.Snapshotter, errdefs.ErrNotFound)
	}
	return chain{
		namespace: src.Namespace, snapshotter: src.Snapshotter, name: info.Name,
		key: chainKey(src.Namespace, src.Snapshotter, info),
	}, nil
}

// chainSize is what the layers of a chain take, in bytes: about what its image will.
func (s *Store) chainSize(ctx context.Context, c chain) (int64, error) {
	sn, err := s.cfg.Snapshotter(c.snapshotter)
	if err != nil {
		return 0, fmt.Errorf("snapshotter %q: %w", c.snapshotter, err)
	}
	ctx = namespaces.WithNamespace(ctx, c.namespace)
	var size int64
	for name := c.name; name != ""; {
		usage, err := sn.Usage(ctx, name)
		if err != nil {
			return 0, fmt.Errorf("usage of snapshot %q: %w", name, err)
		}
		info, err := sn.Stat(ctx, name)
		if err != nil {
			return 0, fmt.Errorf("snapshot %q: %w", name, err)
		}
		size += usage.Size
		name = info.Parent
	}
	return size, nil
}

// makeRoom removes images that nobody has used since a time, the one first that was
// not used for longest, until one of size bytes fits, and returns how large it may
// become. If it cannot fit nothing is removed.
func (s *Store) makeRoom(ctx context.Context, size int64, since time.Time) (int64, error) {
	images, err := s.images()
	if err != nil {
		return 0, err
	}
	slices.SortFunc(images, func(a, b imageFile) int { return a.used.Compare(b.used) })
	var total, stays int64
	for _, img := range images {
		total += img.size
		if !img.used.Before(since) {
			stays += img.size
		}
	}
	var st unix.Statfs_t
	if err := unix.Statfs(s.cfg.Dir, &st); err != nil {
		return 0, fmt.Errorf("free space of %s: %w", s.cfg.Dir, err)
	}
	// Half of what is free is for those who need it now.
	free := int64(st.Bavail) * st.Bsize / 2
	if stays+size >= s.cfg.CacheLimit || size >= free {
		return 0, fmt.Errorf("an image of %d bytes: %d of %d in the cache are taken by others, and it may take %d on the disk: %w",
			size, stays, s.cfg.CacheLimit, free, errdefs.ErrResourceExhausted)
	}
	for _, img := range images {
		if total+size < s.cfg.CacheLimit {
			break
		}
		if err := s.remove(ctx, img, "an image that was pulled needs the room"); err != nil {
			return 0, err
		}
		total -= img.size
	}
	return min(s.cfg.CacheLimit-total, free), nil
}

// builder is how the image is written.
func (b *background) builder(of Builder) Builder {
	of.ImageSize = min(cmp.Or(of.ImageSize, b.limit), b.limit)
	of.attend = b.attend
	return of
}

// attend keeps the builder's process group out of the way until ctx ends or a pod
// waits for the image. Niceness alone would not: pods have cgroups of their own.
func (b *background) attend(ctx context.Context, pid int) error {
	if err := setNiceness(pid, backgroundNiceness); err != nil {
		return err
	}
	calm, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(b.urgent, cancel)()
	for b.turns.Taken(calm) {
		err := unix.Kill(-pid, unix.SIGSTOP)
		b.turns.Yield(calm)
		if err := errors.Join(err, unix.Kill(-pid, unix.SIGCONT)); err != nil {
			return err
		}
		timer := time.NewTimer(runAtLeast)
		select {
		case <-timer.C:
		case <-calm.Done():
		}
		timer.Stop()
	}
	if b.urgent.Err() != nil && ctx.Err() == nil {
		// Without CAP_SYS_NICE it stays as it is, and comes to its end all the same.
		_ = setNiceness(pid, niceness)
	}
	return nil
}
