// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package rootfs keeps one flattened erofs file for each image that pods use.
//
// A container's snapshot names its parent, the committed snapshot of the image's
// topmost layer. A read-only view of that chain is mounted and mkfs.erofs, a
// bounded child process, writes it into one file, which every VM gets as a
// read-only disk. A file appears under its name only when it is whole and on
// stable storage; it is made once however many ask for it.
//
//	<dir>/<key>.erofs    a whole image; its mtime is when it was last used
//	<dir>/<key>.tmp      one being written; its writer holds flock(2) on it
//	<dir>/<key>.mnt/     where the view is mounted meanwhile
package rootfs

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sync/singleflight"

	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
)

const (
	imageSuffix = ".erofs"
	tmpSuffix   = ".tmp"
	mountSuffix = ".mnt"
	// keyLen is the length of a key in hexadecimal digits.
	keyLen = 2 * sha256.Size
	// serialLen is what virtio-blk has room for.
	serialLen = 20
	// emptyKey stands for the chain of an image without layers.
	emptyKey = "0000000000000000000000000000000000000000000000000000000000000000"
)

// Config is what a Store needs.
type Config struct {
	// Dir holds the files; the Store owns all of it.
	Dir string
	// CacheLimit bounds the bytes of images that nobody uses.
	CacheLimit int64
	// Parallel is how many images may be written at a time, Timeout how long one may take.
	Parallel int
	Timeout  time.Duration
	// Builder says how to run mkfs.erofs.
	Builder Builder
	// Snapshotter gives containerd's snapshotter of a name, whose calls need a namespace.
	Snapshotter func(name string) (snapshots.Snapshotter, error)
	// Leases keeps containerd's garbage collector off a view.
	Leases leases.Manager
}

// Store makes and keeps images. Its methods may be called concurrently.
type Store struct {
	cfg    Config
	flight singleflight.Group
	slots  *semaphore.Weighted

	mu   sync.Mutex
	pins map[string]int
	// background has what is being made that no pod has asked for, by key.
	background map[string]*background
}

// Source names a snapshot: a container's, or to Prebuild a committed one.
type Source struct {
	Namespace, Snapshotter, Key string
}

// Image is a file that is pinned: it stays until Release.
type Image struct {
	// Key identifies the image's content in this store.
	Key string
	// Serial is the virtio-blk serial by which a guest finds it.
	Serial string
	// Path of the file.
	Path string

	release func()
}

// NewImage makes an Image of a file that release lets go of; release is called once.
func NewImage(key, path string, release func()) *Image {
	return &Image{Key: key, Serial: Serial(key), Path: path, release: sync.OnceFunc(release)}
}

// Release unpins the image. Calling it again does nothing.
func (i *Image) Release() {
	i.release()
}

// New returns a Store, whose directory it makes. Call Clean before the first Get.
func New(cfg Config) (*Store, error) {
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make image directory: %w", err)
	}
	return &Store{
		cfg:   cfg,
		slots: semaphore.NewWeighted(int64(max(cfg.Parallel, 1))),
		pins:  map[string]int{},

		background: map[string]*background{},
	}, nil
}

// Get gives the image of a container's snapshot, and makes it if there is none
// yet. When ctx ends the caller gets its error, while the making goes on for
// whoever asks next.
func (s *Store) Get(ctx context.Context, src Source) (*Image, error) {
	chain, err := s.resolve(ctx, src)
	if err != nil {
		return nil, err
	}
	img := s.Pin(chain.key)
	if err := s.ensure(ctx, chain); err != nil {
		img.Release()
		return nil, err
	}
	now := time.Now()
	_ = os.Chtimes(img.Path, now, now)
	return img, nil
}

// Pin keeps an image's file, whether it is there yet or not.
func (s *Store) Pin(key string) *Image {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pins[key]++
	return NewImage(key, s.path(key, imageSuffix), func() { s.unpin(key) })
}

// Serial is the virtio-blk serial of the image with a key.
func Serial(key string) string {
	return key[:min(len(key), serialLen)]
}

func (s *Store) unpin(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pins[key]--; s.pins[key] <= 0 {
		delete(s.pins, key)
	}
}

func (s *Store) path(key, suffix string) string {
	return filepath.Join(s.cfg.Dir, key+suffix)
}

// chain is a committed snapshot, that of an image's topmost layer; an empty
// name means that there are no layers.
type chain struct {
	namespace, snapshotter, name string
	key                          string
}

// resolve finds the chain below a container's snapshot.
func (s *Store) resolve(ctx context.Context, src Source) (chain, error) {
	sn, err := s.cfg.Snapshotter(src.Snapshotter)
	if err != nil {
		return chain{}, fmt.Errorf("snapshotter %q: %w", src.Snapshotter, err)
	}
	nctx := namespaces.WithNamespace(ctx, src.Namespace)
	info, err := sn.Stat(nctx, src.Key)
	if err != nil {
		return chain{}, fmt.Errorf("snapshot %q of %s: %w", src.Key, src.Snapshotter, err)
	}
	top, err := imageOf(nctx, sn, info)
	if err != nil {
		return chain{}, err
	}
	if top == "" {
		return chain{namespace: src.Namespace, snapshotter: src.Snapshotter, key: emptyKey}, nil
	}
	return s.committed(ctx, Source{Namespace: src.Namespace, Snapshotter: src.Snapshotter, Key: top})
}

// chainKey identifies what a committed snapshot holds. A name that is a chain
// ID says it; another name may come again with other content. Namespaces do not
// share images, as one may commit anything under the name of another's.
func chainKey(namespace, snapshotter string, info snapshots.Info) string {
	h := sha256.New()
	fmt.Fprintf(h, "%s\x00%s\x00%s", namespace, snapshotter, info.Name)
	if _, err := digest.Parse(info.Name); err != nil {
		fmt.Fprintf(h, "\x00%d", info.Created.UnixNano())
	}
	return hex.EncodeToString(h.Sum(nil))
}

// ensure makes the image of a pinned chain exist.
func (s *Store) ensure(ctx context.Context, c chain) error {
	for {
		err := s.fly(ctx, c)
		if !errors.Is(err, errBackground) {
			return err
		}
	}
}

// errBackground tells that an image that was made in the background has failed,
// which says nothing: it had limits of its own.
var errBackground = errors.New("it was made in the background")

// fly makes the image of a chain, or joins whoever does.
func (s *Store) fly(ctx context.Context, c chain) error {
	if s.exists(c.key) {
		return nil
	}
	done := s.flight.DoChan(c.key, func() (any, error) {
		if s.exists(c.key) {
			return flight{}, nil
		}
		// Detached: who asked first may leave while others wait.
		bctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.cfg.Timeout)
		defer cancel()
		pin := s.Pin(c.key)
		defer pin.Release()
		return flight{}, s.make(bctx, c, nil)
	})
	s.hurry(c.key)
	select {
	case r := <-done:
		if f, ok := r.Val.(flight); r.Err != nil && ok && f.background {
			return errBackground
		}
		return r.Err
	case <-ctx.Done():
		return fmt.Errorf("wait for the image's file system: %w", context.Cause(ctx))
	}
}

func (s *Store) exists(key string) bool {
	_, err := os.Stat(s.path(key, imageSuffix))
	return err == nil
}

// make builds the image under its lock and trims the cache. What is made in the
// background, bg, takes none of the places of those that pods wait for.
func (s *Store) make(ctx context.Context, c chain, bg *background) error {
	if bg == nil {
		if err := s.slots.Acquire(ctx, 1); err != nil {
			return fmt.Errorf("wait for another image to be made: %w", err)
		}
		defer s.slots.Release(1)
	}
	if err := failpoint.At(ctx, failpoint.ImageFile); err != nil {
		return err
	}
	tmp, err := s.lock(ctx, c.key)
	if err != nil {
		return err
	}
	defer tmp.Close()
	if s.exists(c.key) {
		return errors.Join(removeFile(tmp.Name()))
	}
	if err := s.build(ctx, c, tmp, bg); err != nil {
		return errors.Join(fmt.Errorf("make the file system of image %s: %w", c.name, err), removeFile(tmp.Name()))
	}
	s.trim(ctx)
	return nil
}

// lock opens the image's temporary file and locks it against another process
// that uses the same directory. If that one finishes first, its file has
// been renamed, or removed, and is not ours.
func (s *Store) lock(ctx context.Context, key string) (*os.File, error) {
	for {
		f, err := os.OpenFile(s.path(key, tmpSuffix), os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return nil, fmt.Errorf("open temporary image: %w", err)
		}
		if err := flock(ctx, f); err != nil {
			return nil, err
		}
		same, err := isAt(f, f.Name())
		if err == nil && same {
			return f, nil
		}
		_ = f.Close()
		if err != nil {
			return nil, err
		}
		if s.exists(key) {
			// The caller looks again under the lock of a new file.
			continue
		}
	}
}

// isAt is true if path still names the open file.
func isAt(f *os.File, path string) (bool, error) {
	own, err := f.Stat()
	if err != nil {
		return false, fmt.Errorf("stat temporary image: %w", err)
	}
	st, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("stat temporary image: %w", err)
	}
	return os.SameFile(own, st), nil
}

func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// errBusy tells that another process holds a lock.
var errBusy = fmt.Errorf("locked by another process: %w", errdefs.ErrUnavailable)
