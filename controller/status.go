// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"slices"

	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/errdefs"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	shimapi "github.com/cloudhv/containerd-cloudhv/controller/shim"
	"github.com/cloudhv/containerd-cloudhv/vmpool"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

const (
	// infoKey is the key of Info in a verbose status.
	infoKey = "cloudhv"
	// criInfoKey is CRI's own.
	criInfoKey = "info"
)

// Info is what a verbose Status tells, as JSON under the key "cloudhv".
type Info struct {
	State State `json:"state"`
	// Cause is why the sandbox ended.
	Cause string `json:"cause,omitempty"`

	// Pending is why the VM of a ready sandbox, which runs, is not under control
	// since containerd has started; it goes when that is achieved.
	Pending string `json:"pending,omitempty"`

	Hypervisor        string `json:"hypervisor"`
	HypervisorVersion string `json:"hypervisor_version,omitempty"`
	HypervisorReason  string `json:"hypervisor_reason,omitempty"`
	Accelerator       string `json:"accelerator,omitempty"`
	AcceleratorReason string `json:"accelerator_reason,omitempty"`
	GuestKernel       string `json:"guest_kernel,omitempty"`
	GuestAgent        string `json:"guest_agent,omitempty"`

	VCPUs          int   `json:"vcpus"`
	MaxVCPUs       int   `json:"max_vcpus"`
	MemoryBytes    int64 `json:"memory_bytes"`
	MaxMemoryBytes int64 `json:"max_memory_bytes"`

	VMMPid     uint32 `json:"vmm_pid,omitempty"`
	ShimPid    int    `json:"shim_pid,omitempty"`
	Cgroup     string `json:"cgroup,omitempty"`
	NetNS      string `json:"netns,omitempty"`
	ConsoleLog string `json:"console_log"`
	VMMLog     string `json:"vmm_log"`
	ShimLog    string `json:"shim_log"`
	// Outcome is how the sandbox came by its VM: hit (was ready), miss (restored),
	// cold (booted). Snapshot is what it was restored from.
	Outcome  string   `json:"outcome"`
	Snapshot string   `json:"snapshot,omitempty"`
	Images   []string `json:"images,omitempty"`
	// Phases are the parts of the start, in the order they began.
	Phases []Phase `json:"phases,omitempty"`
}

// vmFile is the path of a file of the sandbox's VM.
func vmFile(p *pod, rec *record, name string) string {
	if rec.VM != nil {
		return filepath.Join(rec.VM.Dir, name)
	}
	return p.file(name)
}

// Status tells a sandbox's state from memory: it asks neither VMM nor guest.
// An unknown sandbox is ErrNotFound.
func (c *Controller) Status(_ context.Context, id string, verbose bool) (sandbox.ControllerStatus, error) {
	p, err := c.get(id)
	if err != nil {
		return sandbox.ControllerStatus{}, err
	}
	rec := p.snapshot()
	status := sandbox.ControllerStatus{
		SandboxID: id,
		State:     runtime.PodSandboxState_SANDBOX_NOTREADY.String(),
		CreatedAt: rec.CreatedAt,
		ExitedAt:  rec.ExitedAt,
	}
	if rec.Shim != nil {
		status.Address, status.Version = taskAddress(p), taskAPIVersion
	}
	if rec.State == StateReady {
		status.State = runtime.PodSandboxState_SANDBOX_READY.String()
		status.Pid = vmmPid(&rec)
	}
	if !verbose {
		return status, nil
	}
	info, err := json.Marshal(c.info(p, &rec))
	if err != nil {
		return sandbox.ControllerStatus{}, fmt.Errorf("encode status: %w: %w", err, errdefs.ErrInternal)
	}
	own, err := json.Marshal(criInfo{Pid: status.Pid, Status: string(rec.State), RuntimeType: runtimeType})
	if err != nil {
		return sandbox.ControllerStatus{}, fmt.Errorf("encode status: %w: %w", err, errdefs.ErrInternal)
	}
	status.Info = map[string]string{infoKey: string(info), criInfoKey: string(own)}
	return status, nil
}

// criInfo is what we can tell of CRI's own information on a sandbox. CRI decodes
// it into its type, adds to it, and encodes it again.
type criInfo struct {
	Pid         uint32 `json:"pid"`
	Status      string `json:"processStatus"`
	RuntimeType string `json:"runtimeType"`
}

func (c *Controller) info(p *pod, rec *record) Info {
	info := Info{
		State:          rec.State,
		Cause:          rec.Cause,
		Hypervisor:     rec.Hypervisor,
		GuestKernel:    rec.Guest.Kernel,
		GuestAgent:     rec.Guest.Agent,
		VCPUs:          rec.Size.VCPUs,
		MaxVCPUs:       rec.Max.VCPUs,
		MemoryBytes:    rec.Size.MemoryBytes,
		MaxMemoryBytes: rec.Max.MemoryBytes,
		VMMPid:         vmmPid(rec),
		Cgroup:         rec.Cgroup,
		NetNS:          rec.NetNS,
		ConsoleLog:     vmFile(p, rec, vmm.ConsoleLog),
		VMMLog:         vmFile(p, rec, vmm.VMMLog),
		Outcome:        cmp.Or(rec.Outcome, string(vmpool.Cold)),
		Snapshot:       rec.Snapshot,
		ShimLog:        p.file(shimapi.LogFile),
		Images:         slices.Sorted(maps.Keys(rec.Images)),
		Phases:         rec.Phases,
	}
	if rec.Hypervisor == c.host.Driver {
		info.HypervisorVersion, info.HypervisorReason = c.host.Version, c.why
		info.Accelerator, info.AcceleratorReason = c.host.Accelerator, c.host.Reason
	}
	if rec.Shim != nil {
		info.ShimPid = rec.Shim.Pid
	}
	if rec.State == StateReady {
		info.Pending = p.whyPending()
	}
	return info
}
