// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package snapshot keeps the base snapshots that VMs are restored from. Each is
// a directory named by its key, with the files of the driver's snapshot (the
// guest's RAM and the machine's state), the writable disk as the template left
// it, and a manifest that is written last and says what all of them must be.
//
// A directory is made aside and renamed, and its files never change after that:
// VMs map the RAM privately, so that all of them share its clean pages. A
// snapshot that is not what its manifest says is set aside before it is used. One
// that is made anew gets a directory of its own, named by the key and a number:
// the old one stays as it is for the VMs that use it.
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
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/vmpool/durable"
	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

const (
	// MemoryFile is the template's RAM.
	MemoryFile = "memory"
	// ScratchFile is its writable disk.
	ScratchFile = "scratch"

	tmpPrefix     = ".making-"
	damagedSuffix = ".damaged"
	// awayPrefix begins the names of what is being removed.
	awayPrefix = tmpPrefix + "away-"
	// spare is what must stay free on the file system after a snapshot was made.
	spare = 64 << 20
)

// validID is what names a snapshot: its key and, if it was rebuilt, a number.
var validID = regexp.MustCompile(`^[0-9a-f]{32}(-[1-9][0-9]{0,8})?$`)

// KeyOf is the key of the snapshot with an ID.
func KeyOf(id string) string {
	key, _, _ := strings.Cut(id, "-")
	return key
}

// generation is how often a snapshot was rebuilt.
func generation(id string) int {
	_, n, _ := strings.Cut(id, "-")
	g, _ := strconv.Atoi(n)
	return g
}

// Snapshot is a base snapshot that has been checked. It is immutable, and stays
// until nobody uses it.
type Snapshot struct {
	// Key is that of its Inputs, ID its own: Key, and a number if it was rebuilt.
	Key, ID string
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

	// building is held by the one that makes a snapshot.
	building sync.Mutex

	mu     sync.Mutex
	loaded map[string]*Snapshot       // by key
	making map[string]*making         // by key
	users  map[string]map[string]bool // by the snapshot's ID, the IDs of VMs
}

// making is one attempt to make or to check a snapshot, that any number of
// callers wait for.
type making struct {
	done chan struct{}
	snap *Snapshot
	err  error
}

// enterable is the mode of the store's directories: a VMM that is no root goes through
// them to the files that its driver lets it read.
const enterable = 0o711

// Open opens the store in dir, which it makes, and removes what an earlier
// process left half made.
func Open(dir string) (*Store, error) {
	if err := os.MkdirAll(dir, enterable); err != nil {
		return nil, fmt.Errorf("snapshot store: %w", err)
	}
	if err := os.Chmod(dir, enterable); err != nil {
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
		s.building.Lock()
		defer s.building.Unlock()
		// It may have been rebuilt meanwhile.
		if snap, err := s.Peek(in.Key()); err == nil {
			return snap, nil
		}
		return s.build(ctx, in, build)
	})
}

// Rebuild makes the snapshot anew, as Make does, also if there is one. That stays
// in use until the new one is complete and, for the VMs that map it, until they have
// ended. However many call it at once, one makes it.
func (s *Store) Rebuild(ctx context.Context, in Inputs, build func(ctx context.Context, dir string) (vmm.Snapshot, error)) (*Snapshot, error) {
	return s.once(ctx, "rebuild "+in.Key(), func(ctx context.Context) (*Snapshot, error) {
		asked := time.Now()
		s.building.Lock()
		defer s.building.Unlock()
		// One that was being made when the call came is as good.
		if snap, err := s.Peek(in.Key()); err == nil && snap.Created.After(asked) {
			return snap, nil
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

func (s *Store) path(id string) string { return filepath.Join(s.dir, id) }

// Current is the ID of the snapshot of a key that is in use or, before it was read,
// the newest one on disk; empty if there is none.
func (s *Store) Current(key string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if snap := s.loaded[key]; snap != nil {
		return snap.ID
	}
	return s.newest(key)
}

// newest is the ID of the last snapshot of a key that was made, or empty.
func (s *Store) newest(key string) (id string) {
	list, _ := filepath.Glob(s.path(key) + "*") // the pattern is a good one
	for _, path := range list {
		name := filepath.Base(path)
		if validID.MatchString(name) && KeyOf(name) == key && (id == "" || generation(name) > generation(id)) {
			id = name
		}
	}
	return id
}

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
		return nil, s.damaged(ctx, snap.ID, err)
	}
	id := s.newest(key)
	if id == "" {
		return nil, fmt.Errorf("snapshot %s: %w", key, errdefs.ErrNotFound)
	}
	return s.read(ctx, id)
}

// read reads a snapshot and puts it into use.
func (s *Store) read(ctx context.Context, id string) (*Snapshot, error) {
	key := KeyOf(id)
	if err := failpoint.At(ctx, failpoint.SnapshotRead); err != nil {
		return nil, err
	}
	snap, err := load(s.path(id), key)
	switch {
	case errors.Is(err, errdefs.ErrDataLoss), errors.Is(err, fs.ErrNotExist):
		return nil, s.damaged(ctx, id, err)
	case err != nil:
		return nil, fmt.Errorf("snapshot %s: %w", id, err) // says nothing about the snapshot
	}
	snap.ID = id
	s.mu.Lock()
	defer s.mu.Unlock()
	s.loaded[key] = snap
	return snap, nil
}

// damaged sets a snapshot aside and returns ErrNotFound, as another has to be made.
func (s *Store) damaged(ctx context.Context, id string, why error) error {
	log.G(ctx).WithError(why).WithField("snapshot", id).Warn("a snapshot is damaged; it is set aside and made anew")
	if err := s.SetAside(id); err != nil {
		return err
	}
	return fmt.Errorf("snapshot %s was damaged: %w: %w", id, why, errdefs.ErrNotFound)
}

// SetAside takes a snapshot out of use. VMs that map it go on. The last damaged
// one is kept for whoever wants to know what happened.
func (s *Store) SetAside(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if snap := s.loaded[KeyOf(id)]; snap != nil && snap.ID == id {
		delete(s.loaded, KeyOf(id))
	}
	if _, err := os.Lstat(s.path(id)); errors.Is(err, fs.ErrNotExist) {
		return nil // another one was faster: what is kept is this very snapshot
	}
	old, err := filepath.Glob(filepath.Join(s.dir, "*"+damagedSuffix))
	if err != nil {
		return err
	}
	for _, path := range old {
		if err := os.RemoveAll(path); err != nil {
			return fmt.Errorf("set snapshot %s aside: %w", id, err)
		}
	}
	err = os.Rename(s.path(id), s.path(id)+damagedSuffix)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("set snapshot %s aside: %w", id, err)
	}
	return nil
}

// build makes a snapshot aside and puts it in its place, under s.building.
func (s *Store) build(ctx context.Context, in Inputs, build func(context.Context, string) (vmm.Snapshot, error)) (_ *Snapshot, retErr error) {
	key := in.Key()
	if err := failpoint.At(ctx, failpoint.SnapshotDir); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(s.dir, tmpPrefix)
	if err != nil {
		return nil, fmt.Errorf("make snapshot %s: %w", key, err)
	}
	defer func() {
		if retErr != nil {
			retErr = errors.Join(retErr, os.RemoveAll(dir))
		}
	}()
	if err := os.Chmod(dir, enterable); err != nil {
		return nil, fmt.Errorf("make snapshot %s: %w", key, err)
	}
	if err := failpoint.At(ctx, failpoint.SnapshotMemory); err != nil {
		return nil, err
	}
	if err := reserve(filepath.Join(dir, MemoryFile), in.Size.MemoryBytes); err != nil {
		return nil, fmt.Errorf("make snapshot %s: %w", key, err)
	}
	snap, err := build(ctx, dir)
	if err != nil {
		return nil, fmt.Errorf("make snapshot %s: %w", key, err)
	}
	if err := failpoint.At(ctx, failpoint.SnapshotSeal); err != nil {
		return nil, err
	}
	if err := seal(dir, in, snap); err != nil {
		return nil, fmt.Errorf("make snapshot %s: %w", key, err)
	}
	id := key
	if last := s.newest(key); last != "" {
		id = fmt.Sprintf("%s-%d", key, generation(last)+1)
	}
	if err := failpoint.At(ctx, failpoint.SnapshotName); err != nil {
		return nil, err
	}
	if err := os.Rename(dir, s.path(id)); err != nil {
		return nil, fmt.Errorf("make snapshot %s: %w", id, err)
	}
	if err := durable.SyncDir(s.dir); err != nil {
		log.G(ctx).WithError(err).Warn("a snapshot may not survive a loss of power")
	}
	return s.read(ctx, id)
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

// Hold is Peek and Use in one: nobody removes the snapshot between the two.
func (s *Store) Hold(key, vm string) (*Snapshot, error) {
	s.mu.Lock()
	snap := s.loaded[key]
	if snap != nil {
		s.useLocked(snap.ID, vm)
	}
	s.mu.Unlock()
	if snap == nil {
		return nil, fmt.Errorf("snapshot %s: %w", key, errdefs.ErrNotFound)
	}
	if err := snap.unchanged(); err != nil {
		s.Release(snap.ID, vm)
		return nil, fmt.Errorf("snapshot %s: %w: %w", snap.ID, err, errdefs.ErrNotFound)
	}
	return snap, nil
}

// Use keeps a snapshot for a VM, Release lets it go. A VM of an earlier process
// may use one that is not known any more.
func (s *Store) Use(id, vm string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.useLocked(id, vm)
}

func (s *Store) useLocked(id, vm string) {
	if s.users[id] == nil {
		s.users[id] = map[string]bool{}
	}
	s.users[id][vm] = true
}

// Release is the counterpart of Use; it can be repeated.
func (s *Store) Release(id, vm string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.users[id], vm)
	if len(s.users[id]) == 0 {
		delete(s.users, id)
	}
}

// Collect removes the snapshots that no VM uses, but for the current ones of the
// keys that are wanted.
func (s *Store) Collect(ctx context.Context, wanted ...string) error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("snapshot store: %w", err)
	}
	var errs []error
	for _, e := range entries {
		id := e.Name()
		if strings.HasPrefix(id, awayPrefix) {
			errs = append(errs, os.RemoveAll(s.path(id))) // it was to go, and did not
			continue
		}
		if !validID.MatchString(id) || slices.Contains(wanted, KeyOf(id)) && s.inUse(id) {
			continue
		}
		errs = append(errs, s.discard(ctx, id))
	}
	return errors.Join(errs...)
}

// inUse is true for the snapshot that its key stands for, and for the one that will
// be that when it was read.
func (s *Store) inUse(id string) bool {
	key := KeyOf(id)
	return id == s.Current(key) || id == s.newest(key)
}

// discard removes a snapshot unless a VM uses it.
func (s *Store) discard(ctx context.Context, id string) error {
	if err := failpoint.At(ctx, failpoint.SnapshotAway); err != nil {
		return err
	}
	// Under a name that Open removes: what takes long is not done under the lock.
	trash := s.path(awayPrefix + id)
	s.mu.Lock()
	if len(s.users[id]) > 0 || s.making[KeyOf(id)] != nil {
		s.mu.Unlock()
		return nil
	}
	if snap := s.loaded[KeyOf(id)]; snap != nil && snap.ID == id {
		delete(s.loaded, KeyOf(id))
	}
	err := os.Rename(s.path(id), trash)
	s.mu.Unlock()
	if errors.Is(err, fs.ErrNotExist) {
		return nil // another one removed it
	}
	if err != nil {
		return fmt.Errorf("remove snapshot %s: %w", id, err)
	}
	log.G(ctx).WithField("snapshot", id).Info("removed a snapshot that nothing wants")
	if err := failpoint.At(ctx, failpoint.SnapshotDelete); err != nil {
		return err
	}
	return os.RemoveAll(trash)
}
