// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmpool

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/pkg/atomicfile"
	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

const (
	recordFile    = "vm.json"
	recordVersion = 1
	// maxRecord bounds what is read, in bytes.
	maxRecord = 1 << 20
)

// record is what outlives containerd of one VM: all that is needed to find it, to
// use it or to remove what it has. It is written before each step it describes.
type record struct {
	Version int    `json:"version"`
	ID      string `json:"id"`
	// Key is the snapshot whose memory the VM maps; empty for one that was booted.
	Key string `json:"key,omitempty"`
	// Scratch is the path of its writable disk.
	Scratch string `json:"scratch,omitempty"`
	// Cgroup is the group that it was started in.
	Cgroup string `json:"cgroup,omitempty"`
	// VM is set once the VMM runs.
	VM *vmm.State `json:"vm,omitempty"`
	// Ready is true once the VM may be handed out, Owner names the pod it was given
	// to. It is given once.
	Ready bool   `json:"ready,omitempty"`
	Owner string `json:"owner,omitempty"`
}

func (r *record) save(dir string) error {
	r.Version = recordVersion
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode record of VM %s: %w", r.ID, err)
	}
	f, err := atomicfile.New(filepath.Join(dir, recordFile), 0o600)
	if err != nil {
		return fmt.Errorf("write record of VM %s: %w", r.ID, err)
	}
	if _, err := f.Write(data); err != nil {
		return errors.Join(fmt.Errorf("write record of VM %s: %w", r.ID, err), f.Cancel())
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("write record of VM %s: %w", r.ID, err)
	}
	return nil
}

// loadRecord reads the record in dir. ErrNotFound means that there is none,
// ErrDataLoss that it is not what save wrote.
func loadRecord(dir string) (*record, error) {
	f, err := os.Open(filepath.Join(dir, recordFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("record of VM %s: %w", filepath.Base(dir), errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("read record of VM %s: %w", filepath.Base(dir), err)
	}
	defer f.Close() //nolint:errcheck // only read
	data, err := io.ReadAll(io.LimitReader(f, maxRecord))
	if err != nil {
		return nil, fmt.Errorf("read record of VM %s: %w", filepath.Base(dir), err)
	}
	r := &record{}
	if err := json.Unmarshal(data, r); err != nil {
		return nil, fmt.Errorf("record of VM %s: %w: %w", filepath.Base(dir), err, errdefs.ErrDataLoss)
	}
	if r.Version != recordVersion || r.ID != filepath.Base(dir) {
		return nil, fmt.Errorf("record of VM %s is of version %d and VM %q: %w", filepath.Base(dir), r.Version, r.ID, errdefs.ErrDataLoss)
	}
	return r, nil
}
