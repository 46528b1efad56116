// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package snapshot keeps the base snapshots that VMs are restored from. Each is
// a directory named by its key, with the files of the driver's snapshot (the
// guest's RAM and the machine's state), the writable disk as the template left
// it, and a manifest that is written last and says what all of them must be.
//
// A directory is made aside and renamed, and its files never change after that:
// VMs map the RAM privately, so that all of them share its clean pages. A
// snapshot that is not what its manifest says is set aside before it is used.
package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/vmpool/durable"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

const (
	// MemoryFile is the template's RAM.
	MemoryFile = "memory"
	// ScratchFile is its writable disk.
	ScratchFile = "scratch"

	tmpPrefix     = ".making-"
	damagedSuffix = ".damaged"
	// spare is what must stay free on the file system after a snapshot was made.
	spare = 64 << 20
)

var validKey = regexp.MustCompile(`^[0-9a-f]{32}$`)

// Snapshot is a base snapshot that has been checked. It is immutable, and stays
// until nobody uses it.
type Snapshot struct {
	Key     string
	Created time.Time
	// Bytes is what it takes on disk.
	Bytes int64
	// Inputs tell what it was made of.
	Inputs Inputs
	VMM    vmm.Snapshot
	// Scratch is the disk to copy for a VM.
	Scratch string

	stamps map[string]stamp
}

// Store keeps snapshots in one directory, which no other process uses. Its
// methods may be called concurrently.
type Store struct {
	dir string

	mu     sync.Mutex
	loaded map[string]*Snapshot
	making map[string]*making
	users  map[string]map[string]bool // by key, the IDs of VMs
}

// making is one attempt to make or to check a snapshot, that any number of
// callers wait for.
type making struct {
	done chan struct{}
	snap *Snapshot
	err  error
}

// Open opens the store in dir, which it makes, and removes what an earlier
// process left half made.
func Open(dir string) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("snapshot store: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("snapshot store: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tmpPrefix) {
			errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("snapshot store: %w", err)
	}
	return &Store{
		dir: dir, loaded: map[string]*Snapshot{}, making: map[string]*making{}, users: map[string]map[string]bool{},
	}, nil
}

// Find returns the snapshot of these inputs if there is one that is whole. The
// first call for a key reads all of it. A snapshot that is damaged is set aside.
// ErrNotFound means that it must be made.
func (s *Store) Find(ctx context.Context, in Inputs) (*Snapshot, error) {
	return s.once(ctx, in.Key(), func(ctx context.Context) (*Snapshot, error) { return s.find(ctx, in.Key()) })
}

// Peek is Find for a caller that cannot wait: ErrNotFound also means that it
// would have to read the files.
func (s *Store) Peek(key string) (*Snapshot, error) {
	s.mu.Lock()
	snap := s.loaded[key]
	s.mu.Unlock()
	if snap == nil {
		return nil, fmt.Errorf("snapshot %s: %w", key, errdefs.ErrNotFound)
	}
	if err := snap.unchanged(); err != nil {
		return nil, fmt.Errorf("snapshot %s: %w: %w", key, err, errdefs.ErrNotFound)
	}
	return snap, nil
}

// Make is Find, and makes the snapshot if there is none: build is given an
// empty directory on the store's file system, and leaves in it a driver's
// snapshot and ScratchFile. However many call it at once, one makes it. It goes
// on when the caller leaves; build has to bound its own time.
func (s *Store) Make(ctx context.Context, in Inputs, build func(ctx context.Context, dir string) (vmm.Snapshot, error)) (*Snapshot, error) {
	return s.once(ctx, in.Key(), func(ctx context.Context) (*Snapshot, error) {
		snap, err := s.find(ctx, in.Key())
		if !errdefs.IsNotFound(err) {
			return snap, err
		}
		return s.build(ctx, in, build)
	})
}

// once lets one caller do work about a key; the others wait for its result.
func (s *Store) once(ctx context.Context, key string, do func(context.Context) (*Snapshot, error)) (*Snapshot, error) {
	s.mu.Lock()
	m := s.making[key]
	if m == nil {
		m = &making{done: make(chan struct{})}
		s.making[key] = m
		go func() {
			defer close(m.done)
			m.snap, m.err = do(context.WithoutCancel(ctx))
			s.mu.Lock()
			defer s.mu.Unlock()
			delete(s.making, key)
		}()
	}
	s.mu.Unlock()
	select {
	case <-m.done:
		return m.snap, m.err
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for snapshot %s: %w", key, context.Cause(ctx))
	}
}

func (s *Store) path(key string) string { return filepath.Join(s.dir, key) }

// find looks for a snapshot, in memory and then on disk.
func (s *Store) find(ctx context.Context, key string) (*Snapshot, error) {
	s.mu.Lock()
	snap := s.loaded[key]
	s.mu.Unlock()
	if snap != nil {
		err := snap.unchanged()
		if err == nil {
			return snap, nil
		}
		return nil, s.damaged(ctx, key, err)
	}
	snap, err := load(s.path(key), key)
	if errors.Is(err, fs.ErrNotExist) {
		if _, statErr := os.Lstat(s.path(key)); errors.Is(statErr, fs.ErrNotExist) {
			return nil, fmt.Errorf("snapshot %s: %w", key, errdefs.ErrNotFound)
		}
	}
	switch {
	case errors.Is(err, errdefs.ErrDataLoss), errors.Is(err, fs.ErrNotExist):
		return nil, s.damaged(ctx, key, err)
	case err != nil:
		return nil, fmt.Errorf("snapshot %s: %w", key, err) // says nothing about the snapshot
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.loaded[key] = snap
	return snap, nil
}

// damaged sets a snapshot aside and returns ErrNotFound, as another has to be made.
func (s *Store) damaged(ctx context.Context, key string, why error) error {
	log.G(ctx).WithError(why).WithField("snapshot", key).Warn("a snapshot is damaged; it is set aside and made anew")
	if err := s.SetAside(key); err != nil {
		return err
	}
	return fmt.Errorf("snapshot %s was damaged: %w: %w", key, why, errdefs.ErrNotFound)
}

// SetAside takes a snapshot out of use. VMs that map it go on. The last damaged
// one is kept for whoever wants to know what happened.
func (s *Store) SetAside(key string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.loaded, key)
	old, err := filepath.Glob(filepath.Join(s.dir, "*"+damagedSuffix))
	if err != nil {
		return err
	}
	for _, path := range old {
		if err := os.RemoveAll(path); err != nil {
			return fmt.Errorf("set snapshot %s aside: %w", key, err)
		}
	}
	err = os.Rename(s.path(key), s.path(key)+damagedSuffix)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("set snapshot %s aside: %w", key, err)
	}
	return nil
}

// build makes a snapshot aside and puts it in its place.
func (s *Store) build(ctx context.Context, in Inputs, build func(context.Context, string) (vmm.Snapshot, error)) (_ *Snapshot, retErr error) {
	key := in.Key()
	dir, err := os.MkdirTemp(s.dir, tmpPrefix)
	if err != nil {
		return nil, fmt.Errorf("make snapshot %s: %w", key, err)
	}
	defer func() {
		if retErr != nil {
			retErr = errors.Join(retErr, os.RemoveAll(dir))
		}
	}()
	if err := reserve(filepath.Join(dir, MemoryFile), in.Size.MemoryBytes); err != nil {
		return nil, fmt.Errorf("make snapshot %s: %w", key, err)
	}
	snap, err := build(ctx, dir)
	if err != nil {
		return nil, fmt.Errorf("make snapshot %s: %w", key, err)
	}
	if err := seal(dir, in, snap); err != nil {
		return nil, fmt.Errorf("make snapshot %s: %w", key, err)
	}
	if err := os.Rename(dir, s.path(key)); err != nil {
		return nil, fmt.Errorf("make snapshot %s: %w", key, err)
	}
	if err := durable.SyncDir(s.dir); err != nil {
		log.G(ctx).WithError(err).Warn("a snapshot may not survive a loss of power")
	}
	return s.find(ctx, key)
}

// reserve makes a file of its full size, so that a full disk is an error here
// and not the end of a VMM that writes into a hole.
func reserve(path string, size int64) (retErr error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer func() { retErr = errors.Join(retErr, f.Close()) }()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("free space: %w", err)
	}
	if free := int64(st.Bavail) * st.Bsize; free < size+spare {
		return fmt.Errorf("%d MiB are free beside %s, and a snapshot takes %d: %w",
			free>>20, path, (size+spare)>>20, errdefs.ErrResourceExhausted)
	}
	err = unix.Fallocate(int(f.Fd()), 0, 0, size)
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = f.Truncate(size)
	}
	if err != nil {
		return fmt.Errorf("reserve %d bytes for %s: %w: %w", size, path, err, errdefs.ErrResourceExhausted)
	}
	return nil
}

// Use keeps a snapshot for a VM, Release lets it go. A VM of an earlier process
// may use one that is not known any more.
func (s *Store) Use(key, vm string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.users[key] == nil {
		s.users[key] = map[string]bool{}
	}
	s.users[key][vm] = true
}

// Release is the counterpart of Use; it can be repeated.
func (s *Store) Release(key, vm string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.users[key], vm)
	if len(s.users[key]) == 0 {
		delete(s.users, key)
	}
}

// Collect removes the snapshots that are not wanted and that no VM uses.
func (s *Store) Collect(ctx context.Context, wanted ...string) error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("snapshot store: %w", err)
	}
	var errs []error
	for _, e := range entries {
		key := e.Name()
		if !validKey.MatchString(key) || slices.Contains(wanted, key) {
			continue
		}
		errs = append(errs, s.discard(ctx, key))
	}
	return errors.Join(errs...)
}

// discard removes a snapshot unless a VM uses it.
func (s *Store) discard(ctx context.Context, key string) error {
	// Under a name that Open removes: what takes long is not done under the lock.
	trash := filepath.Join(s.dir, tmpPrefix+"away-"+key)
	s.mu.Lock()
	if len(s.users[key]) > 0 || s.making[key] != nil {
		s.mu.Unlock()
		return nil
	}
	delete(s.loaded, key)
	err := os.Rename(s.path(key), trash)
	s.mu.Unlock()
	if err != nil {
		return fmt.Errorf("remove snapshot %s: %w", key, err)
	}
	log.G(ctx).WithField("snapshot", key).Info("removed a snapshot that nothing wants")
	return os.RemoveAll(trash)
}

// Info describes a snapshot for people.
type Info struct {
	Key     string
	Created time.Time
	Bytes   int64
	// Users is how many VMs map it.
	Users int
	// Checked is true if it was read and found whole by this process.
	Checked bool
	// Damaged is true for one that was set aside.
	Damaged bool
}

// List tells what is on disk, in the order of keys.
func (s *Store) List() ([]Info, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("snapshot store: %w", err)
	}
	var list []Info
	for _, e := range entries {
		key, damaged := strings.CutSuffix(e.Name(), damagedSuffix)
		if !validKey.MatchString(key) {
			continue
		}
		info := Info{Key: key, Damaged: damaged, Bytes: diskUsage(filepath.Join(s.dir, e.Name()))}
		if m, err := readManifest(filepath.Join(s.dir, e.Name())); err == nil {
			info.Created = m.Created
		}
		if !damaged {
			s.mu.Lock()
			info.Users = len(s.users[key])
			info.Checked = s.loaded[key] != nil
			s.mu.Unlock()
		}
		list = append(list, info)
	}
	return list, nil
}

// diskUsage is what the files of a directory take, in bytes.
func diskUsage(dir string) int64 {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0
	}
	var sum int64
	for _, e := range entries {
		var st unix.Stat_t
		if unix.Lstat(filepath.Join(dir, e.Name()), &st) == nil {
			sum += st.Blocks * 512
		}
	}
	return sum
}
