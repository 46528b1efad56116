// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package task

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/machine"
)

// guest is what the agent, and not the host, knows about a container.
type guest struct {
	root, cgroup string
	// pidns is the PID namespace to join, "" for an own one.
	pidns string
	// namespaces are those of the pod that are not the VM's.
	namespaces []specs.LinuxNamespace
	terminal   bool
	pod        machine.Pod
	// privateShm is true if the spec's own /dev/shm stays.
	privateShm bool
}

// checkSpec refuses a spec that no container can be made from.
func checkSpec(s *specs.Spec) error {
	refuse := func(why string) error { return fmt.Errorf("spec: %s: %w", why, errdefs.ErrInvalidArgument) }
	switch {
	case s.Process == nil:
		return refuse("no process")
	case s.Linux == nil:
		return refuse("no linux section")
	case s.Hooks != nil && (len(s.Hooks.Prestart)+len(s.Hooks.CreateRuntime)+len(s.Hooks.CreateContainer)+ //nolint:staticcheck // Prestart is still read by runtimes
		len(s.Hooks.StartContainer)+len(s.Hooks.Poststart)+len(s.Hooks.Poststop)) > 0:
		return refuse("hooks name programs of the host")
	}
	return checkProcess(s.Process)
}

func checkProcess(p *specs.Process) error {
	if len(p.Args) == 0 {
		return fmt.Errorf("process: no arguments: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

// adapt makes a spec the guest's: root file system, cgroup, namespaces, mounts.
func adapt(s *specs.Spec, g guest) {
	readonly := s.Root != nil && s.Root.Readonly
	s.Root = &specs.Root{Path: g.root, Readonly: readonly}
	// Both would need a UTS namespace; the pod's is the VM's.
	s.Hostname, s.Domainname = "", ""
	s.Hooks = nil
	s.Process.Terminal = g.terminal
	s.Linux.CgroupsPath = g.cgroup
	s.Linux.Namespaces = append(g.namespaces, namespaces(s.Linux.Namespaces, g.pidns)...)
	for k := range s.Annotations {
		// These steer crun itself.
		if strings.HasPrefix(k, "run.oci.") {
			delete(s.Annotations, k)
		}
	}
	s.Mounts = mounts(s.Mounts, g, readonly)
}

// namespaces leaves out those that the pod's containers share, which are the
// VM's own or the pod's, and sets the PID namespace. Each container has a cgroup namespace,
// asked for or not: a mount of cgroup2 outside of one, which crun makes for the
// container's /sys/fs/cgroup, changes the options of the whole hierarchy.
func namespaces(in []specs.LinuxNamespace, pidns string) []specs.LinuxNamespace {
	out := []specs.LinuxNamespace{{Type: specs.PIDNamespace, Path: pidns}, {Type: specs.MountNamespace}, {Type: specs.CgroupNamespace}}
	for _, n := range in {
		switch n.Type {
		case specs.NetworkNamespace, specs.IPCNamespace, specs.UTSNamespace, specs.UserNamespace,
			specs.PIDNamespace, specs.MountNamespace, specs.CgroupNamespace:
		default:
			out = append(out, specs.LinuxNamespace{Type: n.Type})
		}
	}
	return out
}

// mounts adds what a pod's containers share.
func mounts(in []specs.Mount, g guest, readonly bool) []specs.Mount {
	out := slices.Clone(in)
	if !g.privateShm {
		// The runtime's default tmpfs gives way to the pod's.
		out = slices.DeleteFunc(out, func(m specs.Mount) bool {
			return path.Clean(m.Destination) == "/dev/shm" && m.Type == "tmpfs"
		})
	}
	shared := []specs.Mount{
		bind(g.pod.Hostname(), "/etc/hostname", readonly),
		bind(g.pod.Hosts(), "/etc/hosts", readonly),
		bind(g.pod.ResolvConf(), "/etc/resolv.conf", readonly),
		{Destination: "/dev/shm", Type: "bind", Source: g.pod.Shm(), Options: []string{"rbind", "rprivate", "nosuid", "nodev", "noexec", "rw"}},
	}
	for _, m := range shared {
		if !slices.ContainsFunc(out, func(o specs.Mount) bool { return path.Clean(o.Destination) == m.Destination }) {
			out = insert(out, m)
		}
	}
	return out
}

// insert adds a mount after all others, but before those that lie below it.
func insert(all []specs.Mount, m specs.Mount) []specs.Mount {
	at := slices.IndexFunc(all, func(o specs.Mount) bool {
		return strings.HasPrefix(path.Clean(o.Destination), m.Destination+"/")
	})
	if at < 0 {
		at = len(all)
	}
	return slices.Insert(all, at, m)
}

func bind(source, destination string, readonly bool) specs.Mount {
	access := "rw"
	if readonly {
		access = "ro"
	}
	return specs.Mount{Destination: destination, Type: "bind", Source: source, Options: []string{"rbind", "rprivate", access}}
}
