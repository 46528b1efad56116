// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package guestspec

import (
	"fmt"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func (t *translation) resources(in *specs.LinuxResources) *specs.LinuxResources {
	const field = "linux.resources."
	t.refuseIf(!emptyBlockIO(in.BlockIO), field+"blockIO", "set", "none, as it names the host's disks")
	t.refuseIf(in.Network != nil, field+"network", "set", "none, as cgroup v2 has no network limits")
	t.refuseIf(len(in.Rdma) > 0, field+"rdma", "set", "none, as a VM has no RDMA devices")
	out := &specs.LinuxResources{
		Devices: t.deviceRules(in.Devices),
		Memory:  t.memory(in.Memory),
		CPU:     t.cpu(in.CPU),
		Unified: t.unified(in.Unified),
	}
	if in.Pids != nil {
		out.Pids = &specs.LinuxPids{Limit: in.Pids.Limit}
	}
	// Those of 0, which kubelet has for all sizes that the host knows, are dropped.
	for _, l := range in.HugepageLimits {
		t.refuseIf(l.Limit > 0, field+"hugepageLimits", fmt.Sprintf("%s: %d", l.Pagesize, l.Limit),
			"0, as a VM's memory is of the host's ordinary pages, and counts as such")
	}
	return out
}

func emptyBlockIO(in *specs.LinuxBlockIO) bool {
	return in == nil || in.Weight == nil && in.LeafWeight == nil && len(in.WeightDevice) == 0 &&
		len(in.ThrottleReadBpsDevice) == 0 && len(in.ThrottleWriteBpsDevice) == 0 &&
		len(in.ThrottleReadIOPSDevice) == 0 && len(in.ThrottleWriteIOPSDevice) == 0
}

// deviceRules lets no rule open a device of the VM whose number means another
// one on the host.
func (t *translation) deviceRules(in []specs.LinuxDeviceCgroup) []specs.LinuxDeviceCgroup {
	var out []specs.LinuxDeviceCgroup
	for _, r := range in {
		if t.allowDisk(r) {
			continue
		}
		if r.Allow && (r.Major != nil || r.Minor != nil) && !knownRule(r) {
			t.refuse("linux.resources.devices", fmt.Sprintf("%s %s:%s", r.Type, number(r.Major), number(r.Minor)), wantRule)
			continue
		}
		out = append(out, specs.LinuxDeviceCgroup{Allow: r.Allow, Type: r.Type, Major: r.Major, Minor: r.Minor, Access: r.Access})
	}
	return out
}

const wantRule = "a device that the container has; " + wantDevice

func knownRule(r specs.LinuxDeviceCgroup) bool {
	if r.Type != "c" || r.Major == nil {
		return false
	}
	const unix98Pty = 136
	if r.Minor == nil || *r.Minor == -1 {
		return *r.Major == unix98Pty
	}
	return guestDevices[charDevice{*r.Major, *r.Minor}]
}

func number(n *int64) string {
	if n == nil {
		return "*"
	}
	return fmt.Sprint(*n)
}

func (t *translation) memory(in *specs.LinuxMemory) *specs.LinuxMemory {
	if in == nil {
		return nil
	}
	const field, noV1 = "linux.resources.memory.", "none, as cgroup v2 does not have it"
	//nolint:staticcheck // deprecated, and refused
	t.refuseIf(in.Kernel != nil, field+"kernel", "set", noV1)
	t.refuseIf(in.KernelTCP != nil, field+"kernelTCP", "set", noV1)
	t.refuseIf(in.Swappiness != nil, field+"swappiness", "set", noV1)
	t.refuseIf(in.DisableOOMKiller != nil && *in.DisableOOMKiller, field+"disableOOMKiller", true, noV1)
	// UseHierarchy is dropped: cgroup v2 is always hierarchical.
	return &specs.LinuxMemory{
		Limit:             in.Limit,
		Reservation:       in.Reservation,
		Swap:              in.Swap,
		CheckBeforeUpdate: in.CheckBeforeUpdate,
	}
}

func (t *translation) cpu(in *specs.LinuxCPU) *specs.LinuxCPU {
	if in == nil {
		return nil
	}
	const field, noV1 = "linux.resources.cpu.", "none, as cgroup v2 does not have it"
	t.refuseIf(in.RealtimeRuntime != nil && *in.RealtimeRuntime != 0, field+"realtimeRuntime", "set", noV1)
	t.refuseIf(in.RealtimePeriod != nil && *in.RealtimePeriod != 0, field+"realtimePeriod", "set", noV1)
	// Cpus and Mems are dropped: the host's numbers mean nothing in the VM.
	return &specs.LinuxCPU{
		Shares: in.Shares,
		Quota:  in.Quota,
		Burst:  in.Burst,
		Period: in.Period,
		Idle:   in.Idle,
	}
}

// unified drops what cpuset says, and refuses what names the host's devices.
func (t *translation) unified(in map[string]string) map[string]string {
	var out map[string]string
	for k, v := range in {
		controller, _, _ := strings.Cut(k, ".")
		switch {
		case controller == "cpuset":
			continue
		case strings.ContainsRune(k, '/'), controller == "io", controller == "rdma", controller == "misc", controller == "dmem":
			t.refuse("linux.resources.unified", k, "a key of cgroup, cpu, memory, pids or hugetlb")
			continue
		}
		if out == nil {
			out = make(map[string]string, len(in))
		}
		out[k] = v
	}
	return out
}
