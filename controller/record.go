// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"fmt"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/controller/directvolume"
	"github.com/cloudhv/containerd-cloudhv/vmpool/durable"
	"github.com/cloudhv/containerd-cloudhv/vmpool/process"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

const (
	recordFile = "record.json"
	// recordVersion changes when an older plugin could not read the record.
	recordVersion = 1
	// maxRecord bounds what is read, in bytes.
	maxRecord = 4 << 20
)

// record is what outlives containerd: all that is needed to find and to undo
// what a sandbox has on the host.
type record struct {
	Version   int    `json:"version"`
	ID        string `json:"id"`
	Namespace string `json:"namespace"`
	State     State  `json:"state"`
	// Pod is what Kubernetes calls it, as CRI was told.
	Pod podName `json:"pod,omitzero"`

	CreatedAt time.Time `json:"created_at"`
	ExitedAt  time.Time `json:"exited_at,omitzero"`
	// ExitStatus is what Wait answers, Cause why the sandbox ended, in words.
	ExitStatus uint32 `json:"exit_status,omitempty"`
	Cause      string `json:"cause,omitempty"`

	// NetNS is the path of the pod's network namespace; empty for none.
	NetNS string `json:"netns,omitempty"`
	// Cgroup is the VMM's, below the hierarchy's root.
	Cgroup string `json:"cgroup,omitempty"`
	// UID is the user that the VMM runs as, if it was booted for the sandbox and is
	// confined.
	UID uint32 `json:"uid,omitempty"`
	// Scratch is the path of the VM's writable disk.
	Scratch string `json:"scratch,omitempty"`
	// Size is the VM's, Max its bound, Sizing what decides it; see sizing.go.
	Size   vmm.Size `json:"size"`
	Max    vmm.Size `json:"max"`
	Sizing *sizing  `json:"sizing,omitempty"`
	// Resizing is true while the VM gets another size: it need not have this one.
	Resizing bool `json:"resizing,omitempty"`

	Hypervisor string `json:"hypervisor,omitempty"`
	// VM is set once the VMM runs, Shim once the shim does.
	VM   *vmm.State        `json:"vm,omitempty"`
	Shim *process.Identity `json:"shim,omitempty"`
	// Outcome is how the pool came by the VM, "" if it was booted for the sandbox;
	// Snapshot is what it was restored from.
	Outcome  string `json:"outcome,omitempty"`
	Snapshot string `json:"snapshot,omitempty"`
	// Images are the disks of the VM by image key: false while one is being plugged.
	Images map[string]bool `json:"images,omitempty"`
	// ImageDisk is which of them the guest finds as vmm.ImageSerial, and not by its own serial.
	ImageDisk string `json:"image_disk,omitempty"`

	// Direct are the pod's direct volumes, and Disks the VM's disks of the host's block
	// devices and files, by serial.
	Direct []directvolume.Volume `json:"direct_volumes,omitempty"`
	Disks  map[string]hostDisk   `json:"disks,omitempty"`

	// Guest is what the agent told of itself.
	Guest guestInfo `json:"guest,omitzero"`
	// Phases tell how long the parts of Start took.
	Phases []Phase `json:"phases,omitempty"`
}

// podName is what a pod is called. All is empty for a sandbox that is none.
type podName struct {
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	UID       string `json:"uid,omitempty"`
}

// guestInfo is what a guest told of itself, bounded and printable.
type guestInfo struct {
	Agent  string `json:"agent,omitempty"`
	Kernel string `json:"kernel,omitempty"`
}

// sizing is Sizing or, in a record that has none yet, what keeps the VM as it is.
func (r *record) sizing() sizing {
	if r.Sizing != nil {
		return *r.Sizing
	}
	return sizing{Default: r.Size, Base: vmm.MinMemory, Max: r.Max, MaxMemoryBy: "max_memory"}
}

// save writes the record durably and in one step.
func (r *record) save(dir string) error {
	r.Version = recordVersion
	if err := durable.WriteJSON(filepath.Join(dir, recordFile), r); err != nil {
		return fmt.Errorf("record of %s: %w", filepath.Base(dir), err)
	}
	return nil
}

// loadRecord reads the record of the sandbox in dir. It returns ErrNotFound if
// there is none, and ErrDataLoss if it cannot be what save wrote.
func loadRecord(dir string) (*record, error) {
	r, id := &record{}, filepath.Base(dir)
	if err := durable.ReadJSON(filepath.Join(dir, recordFile), maxRecord, r); err != nil {
		return nil, fmt.Errorf("record of %s: %w", id, err)
	}
	if r.Version != recordVersion {
		return nil, fmt.Errorf("record of %s has version %d, and this build knows %d: %w",
			id, r.Version, recordVersion, errdefs.ErrDataLoss)
	}
	if r.ID != id || r.Namespace == "" || !r.State.valid() {
		return nil, fmt.Errorf("record of %s is incomplete: %w", id, errdefs.ErrDataLoss)
	}
	return r, nil
}
