// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package guestspec

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// podNamespaces are those that the containers of a pod share, by the names that
// /proc has for them. In a VM they are the VM's own.
var podNamespaces = map[specs.LinuxNamespaceType]string{
	specs.NetworkNamespace: "net",
	specs.IPCNamespace:     "ipc",
	specs.UTSNamespace:     "uts",
}

// namespaces returns those of the guest's spec: mount and cgroup always, and pid
// for a container that has one of its own. To share one is the agent's to do.
func (t *translation) namespaces(in []specs.LinuxNamespace) []specs.LinuxNamespace {
	seen := make(map[specs.LinuxNamespaceType]bool, len(in))
	for _, ns := range in {
		if seen[ns.Type] {
			t.refuse("linux.namespaces."+string(ns.Type), ns.Path, "each namespace once")
			continue
		}
		seen[ns.Type] = true
		t.namespace(ns)
	}
	for _, typ := range []specs.LinuxNamespaceType{
		specs.MountNamespace, specs.PIDNamespace, specs.NetworkNamespace, specs.IPCNamespace, specs.UTSNamespace,
	} {
		t.refuseIf(!seen[typ], "linux.namespaces."+string(typ), "the host's", "the pod's or the container's, as a VM shares none with the host")
	}
	out := []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.CgroupNamespace}}
	if t.out.PidNamespace == guestv1.PidNamespace_PID_CONTAINER {
		out = append(out, specs.LinuxNamespace{Type: specs.PIDNamespace})
	}
	return out
}

func (t *translation) namespace(ns specs.LinuxNamespace) {
	field := "linux.namespaces." + string(ns.Type)
	switch ns.Type {
	case specs.MountNamespace, specs.CgroupNamespace:
		t.refuseString(field, ns.Path, "a new namespace")
	case specs.NetworkNamespace, specs.IPCNamespace, specs.UTSNamespace:
		want := t.podPath(podNamespaces[ns.Type])
		t.refuseIf(ns.Path != want, field, ns.Path, "the pod's, "+want)
	case specs.PIDNamespace:
		t.pidNamespace(field, ns.Path)
	case specs.UserNamespace:
		t.refuseIf(ns.Path != t.podPath("user"), field, ns.Path, "the pod's, "+t.podPath("user"))
	case specs.TimeNamespace:
		t.refuse(field, ns.Path, "none, as containers share the VM's clocks")
	default:
		t.refuse(field, ns.Path, "a namespace that is known here")
	}
}

// podPath is what CRI calls a namespace of the pod.
func (t *translation) podPath(name string) string {
	return fmt.Sprintf("/proc/%d/ns/%s", t.pod.SandboxPid, name)
}

// userNamespace returns the mappings of a container in a user namespace, which is the
// pod's: the agent has made it, and refuses other mappings than its own.
func (t *translation) userNamespace(in *specs.Linux) (uids, gids []specs.LinuxIDMapping) {
	within := slices.ContainsFunc(in.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == specs.UserNamespace })
	n := len(t.refused)
	for _, m := range []struct {
		field string
		ids   []specs.LinuxIDMapping
	}{{"linux.uidMappings", in.UIDMappings}, {"linux.gidMappings", in.GIDMappings}} {
		switch {
		case !within:
			t.refuseIf(len(m.ids) > 0, m.field, m.ids, "none without the pod's user namespace")
		case len(m.ids) != 1 || m.ids[0].ContainerID != 0 || m.ids[0].Size == 0:
			t.refuse(m.field, m.ids, "one mapping, from 0 on")
		}
	}
	if len(t.refused) > n {
		return nil, nil
	}
	return slices.Clone(in.UIDMappings), slices.Clone(in.GIDMappings)
}

// pidNamespace understands CRI's three modes: CONTAINER has no path, POD the
// pod's, and TARGET that of another container's task, whose pid is the guest's.
func (t *translation) pidNamespace(field, path string) {
	if path == "" {
		t.out.PidNamespace = guestv1.PidNamespace_PID_CONTAINER
		return
	}
	isTask := func(pid uint32) bool { return t.pod.IsTask != nil && t.pod.IsTask(pid) }
	pid, ok := procPid(path, "pid")
	switch {
	case !ok:
		t.refuse(field, path, "the pod's or a container's, as /proc/PID/ns/pid")
	case pid == t.pod.SandboxPid && isTask(pid):
		// CRI would say the same for either, and a guess could share too much.
		t.refuse(field, path, "another pid of the pod's VM, as a container in it has the same by chance")
	case pid == t.pod.SandboxPid:
		t.out.PidNamespace = guestv1.PidNamespace_PID_POD
	case isTask(pid):
		t.out.PidNamespace, t.out.TargetPid = guestv1.PidNamespace_PID_TARGET, pid
	default:
		t.refuse(field, path, "the pod's or that of a running container of the pod")
	}
}

// procPid parses /proc/PID/ns/NAME as CRI writes it.
func procPid(path, name string) (uint32, bool) {
	rest, ok := strings.CutPrefix(path, "/proc/")
	if !ok {
		return 0, false
	}
	digits, ok := strings.CutSuffix(rest, "/ns/"+name)
	if !ok {
		return 0, false
	}
	pid, err := strconv.ParseUint(digits, 10, 31)
	if err != nil || pid == 0 {
		return 0, false
	}
	return uint32(pid), true
}
