// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package snapshot

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Usage is what a store's files take on disk, in bytes that are really allocated.
type Usage struct {
	// Current is the snapshot that VMs are restored from, Older are those that VMs
	// still use, Damaged is what was set aside, Making what is not complete.
	Current, Older, Damaged, Making int64
}

// Usage adds up the store's files; key is that of the snapshots in use. What cannot
// be read counts nothing.
func (s *Store) Usage(key string) Usage {
	var u Usage
	current := s.Current(key)
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return u
	}
	for _, e := range entries {
		bytes := diskUsage(filepath.Join(s.dir, e.Name()))
		switch name := e.Name(); {
		case name == current:
			u.Current += bytes
		case strings.HasPrefix(name, tmpPrefix):
			u.Making += bytes
		case strings.HasSuffix(name, damagedSuffix):
			u.Damaged += bytes
		case validID.MatchString(name):
			u.Older += bytes
		}
	}
	return u
}

// Info describes a snapshot for people.
type Info struct {
	ID      string
	Created time.Time
	Bytes   int64
	// Users is how many VMs map it.
	Users int
	// Checked is true if it was read and found whole by this process.
	Checked bool
	// Damaged is true for one that was set aside.
	Damaged bool
}

// List tells what is on disk, in the order of IDs.
func (s *Store) List() ([]Info, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("snapshot store: %w", err)
	}
	var list []Info
	for _, e := range entries {
		id, damaged := strings.CutSuffix(e.Name(), damagedSuffix)
		if !validID.MatchString(id) {
			continue
		}
		info := Info{ID: id, Damaged: damaged, Bytes: diskUsage(filepath.Join(s.dir, e.Name()))}
		if m, err := readManifest(filepath.Join(s.dir, e.Name())); err == nil {
			info.Created = m.Created
		}
		if !damaged {
			s.mu.Lock()
			info.Users = len(s.users[id])
			snap := s.loaded[KeyOf(id)]
			info.Checked = snap != nil && snap.ID == id
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
