// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package snapshot

import (
	"os"
	"path/filepath"
	"strings"
)

// Usage is what a store's files take on disk, in bytes that are really allocated.
type Usage struct {
	// Current is the snapshot that VMs are restored from, Older are those that VMs
	// still use, Damaged is what was set aside, Making what is not complete.
	Current, Older, Damaged, Making int64
}

// Usage adds up the store's files; current is the key of the snapshot in use. What
// cannot be read counts nothing.
func (s *Store) Usage(current string) Usage {
	var u Usage
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
		case validKey.MatchString(name):
			u.Older += bytes
		}
	}
	return u
}
