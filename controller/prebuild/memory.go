// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package prebuild

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/vmpool/durable"
)

const (
	memoryFile    = "memory.json"
	memoryVersion = 1
	// maxUsed repositories are remembered; the one goes first that was not used for
	// longest. maxPending images wait to be made.
	maxUsed    = 1024
	maxPending = 256
	// maxRepository and maxName bound names, in bytes. containerd's own are longer
	// only where nobody has looked.
	maxRepository = 512
	maxName       = 1024
	// maxMemory bounds what is read, in bytes: it is more than all of that.
	maxMemory = 8 << 20
	// freshness is how exactly the last use is known: one a pod would be a write a pod.
	freshness = 24 * time.Hour
)

// use is a repository of which a pod has run an image.
type use struct {
	Namespace   string    `json:"namespace"`
	Snapshotter string    `json:"snapshotter"`
	Repository  string    `json:"repository"`
	At          time.Time `json:"at"`
}

// image is an image by its name.
type image struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
}

// memory is what outlives containerd: what pods have run, and what was to be made.
type memory struct {
	Version int `json:"version"`
	// Used is in the order of the last use.
	Used []use `json:"used,omitempty"`
	// Pending is in the order in which images came.
	Pending []image `json:"pending,omitempty"`

	path string
}

// openMemory reads what is remembered in dir, which it makes, and owns. Where that
// cannot be read nothing is, and the error says why; the memory can be used all the
// same.
func openMemory(dir string) (*memory, error) {
	m := &memory{path: filepath.Join(dir, memoryFile)}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return m, fmt.Errorf("make directory: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return m, fmt.Errorf("read directory: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if e.Name() != memoryFile { // a write that ended in the middle
			errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	read := memory{path: m.path}
	err = durable.ReadJSON(m.path, maxMemory, &read)
	switch {
	case errdefs.IsNotFound(err):
	case err != nil:
		errs = append(errs, err)
	case read.Version != memoryVersion:
		errs = append(errs, fmt.Errorf("%s has version %d: %w", m.path, read.Version, errdefs.ErrDataLoss))
	default:
		read.Used = read.Used[max(0, len(read.Used)-maxUsed):]
		read.Pending = read.Pending[max(0, len(read.Pending)-maxPending):]
		m = &read
	}
	return m, errors.Join(errs...)
}

func (m *memory) save() error {
	m.Version = memoryVersion
	return durable.WriteJSON(m.path, m)
}

// remember notes a use, and returns false if there is nothing new in it.
func (m *memory) remember(u use) bool {
	i := slices.IndexFunc(m.Used, func(o use) bool {
		return o.Namespace == u.Namespace && o.Snapshotter == u.Snapshotter && o.Repository == u.Repository
	})
	if i >= 0 {
		// A clock that was set back must not stop it.
		if age := u.At.Sub(m.Used[i].At); age >= 0 && age < freshness {
			return false
		}
		m.Used = slices.Delete(m.Used, i, i+1)
	}
	m.Used = append(m.Used, u)
	m.Used = slices.Clone(m.Used[max(0, len(m.Used)-maxUsed):])
	return true
}
