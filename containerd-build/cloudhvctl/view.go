// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"encoding/json"
	"io"
	"maps"
	"time"

	"github.com/urfave/cli/v3"
	"google.golang.org/protobuf/types/known/timestamppb"

	ctlv1 "github.com/cloudhv/containerd-cloudhv/controller/ctlapi/v1"
)

// Values of --output.
const (
	formatText = "text"
	formatJSON = "json"
)

// show prints an answer as it was asked for.
func show(cmd *cli.Command, view any, text func(io.Writer) error) error {
	w := cmd.Root().Writer
	if cmd.String("output") != formatJSON {
		return text(w)
	}
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(view)
}

// What follows is the JSON that scripts read: every field is always there, sizes
// are in bytes, times in RFC 3339 or null, durations in seconds.

type statusView struct {
	Fit        bool              `json:"fit"`
	Reasons    []string          `json:"reasons"`
	Version    string            `json:"version"`
	Hypervisor hypervisorView    `json:"hypervisor"`
	Pool       poolView          `json:"pool"`
	Snapshots  []snapshotView    `json:"snapshots"`
	VMs        map[string]uint32 `json:"vms"`
}

type hypervisorView struct {
	Name              string `json:"name"`
	Version           string `json:"version"`
	Binary            string `json:"binary"`
	Reason            string `json:"reason"`
	Accelerator       string `json:"accelerator"`
	AcceleratorReason string `json:"accelerator_reason"`
	Confinement       string `json:"confinement"`
	OverheadBytes     int64  `json:"overhead_bytes"`
}

type poolView struct {
	On             bool    `json:"on"`
	OffReason      string  `json:"off_reason"`
	Drained        bool    `json:"drained"`
	Ready          uint32  `json:"ready"`
	Making         uint32  `json:"making"`
	Target         uint32  `json:"target"`
	Max            uint32  `json:"max"`
	MemoryBytes    int64   `json:"memory_bytes"`
	MaxMemoryBytes int64   `json:"max_memory_bytes"`
	Usable         bool    `json:"usable"`
	Hits           uint64  `json:"hits"`
	Misses         uint64  `json:"misses"`
	Cold           uint64  `json:"cold"`
	Failed         uint64  `json:"failed"`
	Failures       uint32  `json:"failures"`
	PauseSeconds   float64 `json:"pause_seconds"`
	LastError      string  `json:"last_error"`
}

type snapshotView struct {
	ID      string     `json:"id"`
	Created *time.Time `json:"created"`
	Bytes   int64      `json:"bytes"`
	Users   uint32     `json:"users"`
	Current bool       `json:"current"`
	Damaged bool       `json:"damaged"`
}

type podView struct {
	ID                  string `json:"id"`
	ContainerdNamespace string `json:"containerd_namespace"`
	Namespace           string `json:"namespace"`
	Name                string `json:"name"`
	UID                 string `json:"uid"`
}

type vmView struct {
	ID           string      `json:"id"`
	Pod          *podView    `json:"pod"`
	State        string      `json:"state"`
	Outcome      string      `json:"outcome"`
	VCPUs        uint32      `json:"vcpus"`
	MemoryBytes  int64       `json:"memory_bytes"`
	VMMPid       uint32      `json:"vmm_pid"`
	ShimPid      uint32      `json:"shim_pid"`
	VMMPSSBytes  int64       `json:"vmm_pss_bytes"`
	ShimPSSBytes int64       `json:"shim_pss_bytes"`
	Created      *time.Time  `json:"created"`
	Snapshot     string      `json:"snapshot"`
	Phases       []phaseView `json:"phases"`
	Cause        string      `json:"cause"`
}

type phaseView struct {
	Name        string  `json:"name"`
	AtSeconds   float64 `json:"at_seconds"`
	TookSeconds float64 `json:"took_seconds"`
}

type consoleView struct {
	VM      string `json:"vm"`
	Pod     string `json:"pod"`
	Console string `json:"console"`
}

type drainView struct {
	Ended uint32 `json:"ended"`
}

type fillView struct {
	Ready uint32 `json:"ready"`
}

type rebuildView struct {
	Snapshot snapshotView `json:"snapshot"`
}

func viewStatus(s *ctlv1.StatusResponse) statusView {
	h, p := s.GetHypervisor(), s.GetPool()
	v := statusView{
		Fit: s.GetFit(), Reasons: append([]string{}, s.GetReasons()...), Version: s.GetVersion(),
		Hypervisor: hypervisorView{
			Name: h.GetName(), Version: h.GetVersion(), Binary: h.GetBinary(), Reason: h.GetReason(),
			Accelerator: h.GetAccelerator(), AcceleratorReason: h.GetAcceleratorReason(),
			Confinement: h.GetConfinement(), OverheadBytes: h.GetOverheadBytes(),
		},
		Pool: poolView{
			On: p.GetOn(), OffReason: p.GetOffReason(), Drained: p.GetDrained(), Ready: p.GetReady(), Making: p.GetMaking(),
			Target: p.GetTarget(), Max: p.GetMax(), MemoryBytes: p.GetMemoryBytes(), MaxMemoryBytes: p.GetMaxMemoryBytes(),
			Usable: p.GetUsable(), Hits: p.GetHits(), Misses: p.GetMisses(), Cold: p.GetCold(), Failed: p.GetFailed(),
			Failures: p.GetFailures(), PauseSeconds: p.GetPause().AsDuration().Seconds(), LastError: p.GetLastError(),
		},
		Snapshots: []snapshotView{}, VMs: map[string]uint32{},
	}
	for _, snap := range s.GetSnapshots() {
		v.Snapshots = append(v.Snapshots, viewSnapshot(snap))
	}
	maps.Copy(v.VMs, s.GetVms())
	return v
}

func viewSnapshot(s *ctlv1.Snapshot) snapshotView {
	return snapshotView{
		ID: s.GetId(), Created: timeOf(s.GetCreated()), Bytes: s.GetBytes(), Users: s.GetUsers(), Current: s.GetCurrent(), Damaged: s.GetDamaged(),
	}
}

func timeOf(t *timestamppb.Timestamp) *time.Time {
	if t == nil {
		return nil
	}
	at := t.AsTime()
	return &at
}

// vmList is what vms prints.
type vmList []vmView

// viewVMs leaves out the pods that have ended, unless all are wanted.
func viewVMs(l *ctlv1.ListResponse, all bool) vmList {
	list := vmList{}
	for _, vm := range l.GetVms() {
		if vm.GetState() == "stopped" && !all {
			continue
		}
		v := vmView{
			ID: vm.GetId(), State: vm.GetState(), Outcome: vm.GetOutcome(), VCPUs: vm.GetVcpus(), MemoryBytes: vm.GetMemoryBytes(),
			VMMPid: vm.GetVmmPid(), ShimPid: vm.GetShimPid(), VMMPSSBytes: vm.GetVmmPssBytes(), ShimPSSBytes: vm.GetShimPssBytes(),
			Created: timeOf(vm.GetCreated()), Snapshot: vm.GetSnapshot(), Phases: []phaseView{}, Cause: vm.GetCause(),
		}
		if p := vm.GetPod(); p != nil {
			v.Pod = &podView{
				ID: p.GetId(), ContainerdNamespace: p.GetContainerdNamespace(), Namespace: p.GetNamespace(), Name: p.GetName(), UID: p.GetUid(),
			}
		}
		for _, ph := range vm.GetPhases() {
			v.Phases = append(v.Phases, phaseView{
				Name: ph.GetName(), AtSeconds: ph.GetAt().AsDuration().Seconds(), TookSeconds: ph.GetTook().AsDuration().Seconds(),
			})
		}
		list = append(list, v)
	}
	return list
}
