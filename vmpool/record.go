// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmpool

import (
	"fmt"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/vmpool/durable"
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
	// Key is the ID of the snapshot whose memory the VM maps; empty for one that was
	// booted.
	Key string `json:"key,omitempty"`
	// Made is when it began to be made.
	Made time.Time `json:"made,omitzero"`
	// Scratch is the path of its writable disk.
	Scratch string `json:"scratch,omitempty"`
	// Cgroup is the group that it was started in.
	Cgroup string `json:"cgroup,omitempty"`
	// UID is the user that the VMM runs as; 0 if it is not confined.
	UID uint32 `json:"uid,omitempty"`
	// VM is set once the VMM runs.
	VM *vmm.State `json:"vm,omitempty"`
	// Ready is true once the VM may be handed out, Owner names the pod it was given
	// to. It is given once.
	Ready bool   `json:"ready,omitempty"`
	Owner string `json:"owner,omitempty"`
}

func (r *record) save(dir string) error {
	r.Version = recordVersion
	if err := durable.WriteJSON(filepath.Join(dir, recordFile), r); err != nil {
		return fmt.Errorf("record of VM %s: %w", r.ID, err)
	}
	return nil
}

// loadRecord reads the record in dir. ErrNotFound means that there is none,
// ErrDataLoss that it is not what save wrote.
func loadRecord(dir string) (*record, error) {
	r, id := &record{}, filepath.Base(dir)
	if err := durable.ReadJSON(filepath.Join(dir, recordFile), maxRecord, r); err != nil {
		return nil, fmt.Errorf("record of VM %s: %w", id, err)
	}
	if r.Version != recordVersion || r.ID != id {
		return nil, fmt.Errorf("record of VM %s is of version %d and VM %q: %w", id, r.Version, r.ID, errdefs.ErrDataLoss)
	}
	return r, nil
}
