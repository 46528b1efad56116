// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package guestspec

import (
	"fmt"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func (t *translation) linux(in *specs.Linux, id string) *specs.Linux {
	if in == nil {
		t.refuse("linux", "missing", "a Linux container")
		return nil
	}
	t.unsupported(in)
	// CgroupsPath names a cgroup of the host, and MountLabel its SELinux policy.
	out := &specs.Linux{
		CgroupsPath:       cgroupParent + id,
		Namespaces:        t.namespaces(in.Namespaces),
		Devices:           t.devices(in),
		Seccomp:           t.seccomp(in.Seccomp),
		RootfsPropagation: in.RootfsPropagation,
		MaskedPaths:       in.MaskedPaths,
		ReadonlyPaths:     in.ReadonlyPaths,
		Personality:       t.personality(in.Personality),
	}
	out.UIDMappings, out.GIDMappings = t.userNamespace(in)
	if in.Resources != nil {
		out.Resources = t.resources(in.Resources)
	}
	return out
}

// unsupported refuses what has no counterpart in the VM.
func (t *translation) unsupported(in *specs.Linux) {
	for name := range in.Sysctl {
		t.refuse("linux.sysctl", name, "the sysctl in the pod's security context, as containers share the pod's namespaces")
	}
	for name := range in.NetDevices {
		t.refuse("linux.netDevices", name, "none, as the pod's interfaces come from CNI")
	}
	t.refuseIf(in.IntelRdt != nil, "linux.intelRdt", "set", "none, as it controls the host's processors")
	t.refuseIf(in.MemoryPolicy != nil, "linux.memoryPolicy", "set", "none, as it names the host's memory nodes")
	for name := range in.TimeOffsets {
		t.refuse("linux.timeOffsets", name, "none, as containers share the VM's clocks")
	}
}

func (t *translation) personality(in *specs.LinuxPersonality) *specs.LinuxPersonality {
	if in == nil {
		return nil
	}
	t.refuseIf(len(in.Flags) > 0, "linux.personality.flags", in.Flags, "none, as none is defined")
	return &specs.LinuxPersonality{Domain: in.Domain}
}

func (t *translation) seccomp(in *specs.LinuxSeccomp) *specs.LinuxSeccomp {
	if in == nil {
		return nil
	}
	const noNotify = "none, as a listener on the host cannot serve a process in a VM"
	t.refuseString("linux.seccomp.listenerPath", in.ListenerPath, noNotify)
	t.refuseString("linux.seccomp.listenerMetadata", in.ListenerMetadata, noNotify)
	t.refuseIf(in.DefaultAction == specs.ActNotify, "linux.seccomp.defaultAction", in.DefaultAction, "another action; "+noNotify)
	out := &specs.LinuxSeccomp{
		DefaultAction:   in.DefaultAction,
		DefaultErrnoRet: in.DefaultErrnoRet,
		Architectures:   in.Architectures,
		Flags:           in.Flags,
	}
	for _, s := range in.Syscalls {
		t.refuseIf(s.Action == specs.ActNotify, "linux.seccomp.syscalls.action", fmt.Sprint(s.Names, " ", s.Action), "another action; "+noNotify)
		call := specs.LinuxSyscall{Names: s.Names, Action: s.Action, ErrnoRet: s.ErrnoRet}
		for _, a := range s.Args {
			call.Args = append(call.Args, specs.LinuxSeccompArg{Index: a.Index, Value: a.Value, ValueTwo: a.ValueTwo, Op: a.Op})
		}
		out.Syscalls = append(out.Syscalls, call)
	}
	return out
}

// charDevice is a device that the guest's kernel has under the same number.
type charDevice struct{ major, minor int64 }

var guestDevices = map[charDevice]bool{
	{1, 3}:    true, // null
	{1, 5}:    true, // zero
	{1, 7}:    true, // full
	{1, 8}:    true, // random
	{1, 9}:    true, // urandom
	{5, 0}:    true, // tty
	{5, 2}:    true, // ptmx
	{10, 200}: true, // net/tun
	{10, 229}: true, // fuse
}

const wantDevice = "a block device or one of null, zero, full, random, urandom, tty, ptmx, net/tun and fuse, as other devices of the host are not in a VM"

func (t *translation) devices(in *specs.Linux) []specs.LinuxDevice {
	var out []specs.LinuxDevice
	for _, d := range in.Devices {
		if d.Type == "b" {
			t.disk(d, len(in.UIDMappings)+len(in.GIDMappings) > 0)
			continue
		}
		if (d.Type != "c" && d.Type != "u") || !guestDevices[charDevice{d.Major, d.Minor}] {
			t.refuse("linux.devices", fmt.Sprintf("%s (%s %d:%d)", d.Path, d.Type, d.Major, d.Minor), wantDevice)
			continue
		}
		out = append(out, specs.LinuxDevice{
			Path: d.Path, Type: d.Type, Major: d.Major, Minor: d.Minor,
			FileMode: d.FileMode, UID: d.UID, GID: d.GID,
		})
	}
	return out
}
