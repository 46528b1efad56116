// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package guestspec

import (
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// defaultAppArmor is the profile that CRI loads into the host's kernel for
// containers that ask for none.
const defaultAppArmor = "cri-containerd.apparmor.d"

func (t *translation) process(field string, in *specs.Process) *specs.Process {
	if in == nil {
		t.refuse(field, "missing", "a process")
		return nil
	}
	if in.ApparmorProfile != "" && in.ApparmorProfile != "unconfined" && in.ApparmorProfile != defaultAppArmor {
		t.refuse(field+".apparmorProfile", in.ApparmorProfile, "the default profile or unconfined, as profiles are loaded on the host only")
	}
	t.refuseString(field+".commandLine", in.CommandLine, "args instead")
	t.refuseIf(in.Scheduler != nil, field+".scheduler", "set", "none, as the guest's crun does not know it")
	t.refuseIf(in.IOPriority != nil, field+".ioPriority", "set", "none, as the guest's crun does not know it")
	t.refuseIf(in.ExecCPUAffinity != nil, field+".execCPUAffinity", "set", "none, as it names the host's processors")
	t.refuseIf(len(in.Args) == 0, field+".args", "empty", "a program")
	t.refuseIf(!strings.HasPrefix(in.Cwd, "/"), field+".cwd", in.Cwd, "an absolute path")
	// SelinuxLabel is dropped.
	return &specs.Process{
		Terminal:        in.Terminal,
		ConsoleSize:     in.ConsoleSize,
		User:            t.user(field+".user", in.User),
		Args:            in.Args,
		Env:             in.Env,
		Cwd:             in.Cwd,
		Capabilities:    capabilities(in.Capabilities),
		Rlimits:         rlimits(in.Rlimits),
		NoNewPrivileges: in.NoNewPrivileges,
		OOMScoreAdj:     in.OOMScoreAdj,
	}
}

func (t *translation) user(field string, in specs.User) specs.User {
	t.refuseString(field+".username", in.Username, "a uid instead")
	return specs.User{
		UID:            in.UID,
		GID:            in.GID,
		Umask:          in.Umask,
		AdditionalGids: in.AdditionalGids,
	}
}

func capabilities(in *specs.LinuxCapabilities) *specs.LinuxCapabilities {
	if in == nil {
		return nil
	}
	return &specs.LinuxCapabilities{
		Bounding:    in.Bounding,
		Effective:   in.Effective,
		Inheritable: in.Inheritable,
		Permitted:   in.Permitted,
		Ambient:     in.Ambient,
	}
}

func rlimits(in []specs.POSIXRlimit) []specs.POSIXRlimit {
	var out []specs.POSIXRlimit
	for _, l := range in {
		out = append(out, specs.POSIXRlimit{Type: l.Type, Hard: l.Hard, Soft: l.Soft})
	}
	return out
}
