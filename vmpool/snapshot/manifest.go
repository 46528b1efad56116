// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package snapshot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/vmpool/durable"
	"github.com/cloudhv/containerd-cloudhv/vmpool/sparse"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

const (
	manifestFile = "manifest.json"
	// maxManifest bounds what is read of one, in bytes.
	maxManifest = 64 << 10
)

// manifest says what a snapshot's files must be. A directory without one is half
// written.
type manifest struct {
	Format  int             `json:"format"`
	Key     string          `json:"key"`
	Created time.Time       `json:"created"`
	Inputs  Inputs          `json:"inputs"`
	VMM     vmm.Snapshot    `json:"vmm"`
	Files   map[string]file `json:"files"`
}

type file struct {
	Bytes  int64  `json:"bytes"`
	SHA256 string `json:"sha256"`
}

// seal writes the manifest of what is in dir, when that has reached the disk.
func seal(dir string, in Inputs, snap vmm.Snapshot) error {
	in.Format = Format
	m := manifest{Format: Format, Key: in.Key(), Created: time.Now().UTC(), Inputs: in, VMM: snap, Files: map[string]file{}}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !e.Type().IsRegular() {
			return fmt.Errorf("%s is no regular file: %w", e.Name(), errdefs.ErrInternal)
		}
		if m.Files[e.Name()], err = sealFile(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	for _, name := range []string{MemoryFile, ScratchFile} {
		if _, ok := m.Files[name]; !ok {
			return fmt.Errorf("there is no file %s: %w", name, errdefs.ErrInternal)
		}
	}
	return durable.WriteJSON(filepath.Join(dir, manifestFile), m)
}

func sealFile(path string) (file, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return file{}, err
	}
	defer f.Close() //nolint:errcheck // synced
	if err := f.Sync(); err != nil {
		return file{}, fmt.Errorf("sync %s: %w", path, err)
	}
	st, err := f.Stat()
	if err != nil {
		return file{}, err
	}
	sum, err := sparse.Hash(path)
	return file{Bytes: st.Size(), SHA256: sum}, err
}

func readManifest(dir string) (*manifest, error) {
	m := &manifest{}
	if err := durable.ReadJSON(filepath.Join(dir, manifestFile), maxManifest, m); err != nil {
		return nil, fmt.Errorf("the manifest: %w", err)
	}
	return m, nil
}

// load reads a snapshot and compares all of it with its manifest.
func load(dir, key string) (*Snapshot, error) {
	m, err := readManifest(dir)
	if err != nil {
		return nil, err
	}
	if m.Format != Format || m.Key != key || m.Inputs.Key() != key {
		return nil, fmt.Errorf("the manifest is of format %d and key %q, want %d and %q: %w", m.Format, m.Key, Format, key, errdefs.ErrDataLoss)
	}
	snap := &Snapshot{
		Key: key, Created: m.Created, Inputs: m.Inputs, VMM: m.VMM, Scratch: filepath.Join(dir, ScratchFile),
		Bytes: diskUsage(dir), stamps: map[string]stamp{},
	}
	snap.VMM.Dir = dir
	for _, name := range []string{MemoryFile, ScratchFile} {
		if _, ok := m.Files[name]; !ok {
			return nil, fmt.Errorf("the manifest names no %s: %w", name, errdefs.ErrDataLoss)
		}
	}
	for name, want := range m.Files {
		if name != filepath.Base(name) {
			return nil, fmt.Errorf("the manifest names a file %q: %w", name, errdefs.ErrDataLoss)
		}
		path := filepath.Join(dir, name)
		// The stamp comes first: a change while the file is read shows later.
		at, err := stampOf(path)
		if err != nil {
			return nil, fmt.Errorf("%s: %w: %w", name, err, errdefs.ErrDataLoss)
		}
		sum, err := sparse.Hash(path)
		if err != nil {
			return nil, err
		}
		if at.size != want.Bytes || sum != want.SHA256 {
			return nil, fmt.Errorf("%s is not what was written (%d bytes, SHA-256 %s; want %d, %s): %w",
				name, at.size, sum, want.Bytes, want.SHA256, errdefs.ErrDataLoss)
		}
		snap.stamps[path] = at
	}
	return snap, nil
}

// stamp tells cheaply whether a file was changed since it was read.
type stamp struct {
	size         int64
	ino          uint64
	mtime, ctime unix.Timespec
}

func stampOf(path string) (stamp, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return stamp{}, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return stamp{}, errors.New("no regular file")
	}
	return stamp{size: st.Size, ino: st.Ino, mtime: st.Mtim, ctime: st.Ctim}, nil
}

// unchanged fails if a file is not the one that was read.
func (s *Snapshot) unchanged() error {
	for path, want := range s.stamps {
		got, err := stampOf(path)
		if err != nil {
			return fmt.Errorf("%s: %w: %w", filepath.Base(path), err, errdefs.ErrDataLoss)
		}
		if got != want {
			return fmt.Errorf("%s was changed: %w", filepath.Base(path), errdefs.ErrDataLoss)
		}
	}
	return nil
}
