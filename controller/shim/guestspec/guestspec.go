// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package guestspec turns the OCI spec that CRI wrote for a container on the
// host into what the agent in the pod's VM needs to run the same container there.
//
// The guest's spec is built from nothing, field by field: what is not written
// down here does not get into a VM. Each field is passed, changed, dropped where
// that takes nothing from the container, or refused by its name; a test goes
// through the OCI types by reflection and fails when one has a field that is not
// dealt with.
//
// Dropped are: AppArmor's default profile and SELinux labels (their policies are
// the host's, the VM's wall stands in their place), cpuset numbers (they name the
// host's processors and memory nodes), namespaces of the pod (the VM is the pod),
// crun's own annotations, hostname, and CRI's default /dev/shm (the agent mounts
// the pod's).
package guestspec

import (
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloudhv/containerd-cloudhv/controller/annotation"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

const (
	// OCIVersion is the version of the OCI spec that the guest's crun implements.
	OCIVersion = "1.0.2"
	// rootPath stands in Root.Path until the agent sets it.
	rootPath = "rootfs"
	// cgroupParent is where the agent keeps the cgroups of a pod's containers.
	cgroupParent = "/pod/"
	// maxAnnotationBytes bounds all annotations of a container, as Kubernetes does.
	maxAnnotationBytes = 256 << 10
)

// Pod is what a translation has to know of the container's pod.
type Pod struct {
	// SandboxPid is the pid that CRI has for the pod: a namespace path
	// /proc/SandboxPid/ns/… means the pod's.
	SandboxPid uint32
	// IsTask tells whether pid is that of a task in the pod; nil means none is.
	IsTask func(pid uint32) bool
}

// Container is a translated container: the parts of an agent's CreateRequest.
type Container struct {
	// Spec is the guest's. It shares slices and maps with the host's, and the sources of
	// bind mounts and their ID mappings are the host's still.
	Spec *specs.Spec
	// PidNamespace says whose PID namespace the container joins, and TargetPid
	// is the guest pid for PID_TARGET.
	PidNamespace guestv1.PidNamespace
	TargetPid    uint32
	// PrivateShm is true if Spec brings a /dev/shm of its own.
	PrivateShm bool
	// Disks are the host's block devices, which Spec lacks: they have other numbers in the
	// VM.
	Disks []Disk
}

// Translate makes the container id's guest spec out of CRI's host spec, which it
// leaves as it is. The error names every field that is refused, with its value
// and what would be right, and is an errdefs.ErrInvalidArgument. It touches no file.
func Translate(host *specs.Spec, id string, pod Pod) (*Container, error) {
	t := &translation{pod: pod, out: &Container{}}
	out := &specs.Spec{
		Version: OCIVersion,
		Process: t.process("process", host.Process),
		Root:    t.root(host.Root),
	}
	// Hostname is dropped: the agent has set the pod's.
	t.refuseString("domainname", host.Domainname, "none, as the pod's UTS namespace is shared")
	t.hooks(host.Hooks)
	out.Annotations = t.annotations(host.Annotations)
	out.Mounts = t.mounts(host.Mounts)
	out.Linux = t.linux(host.Linux, id)
	t.refuseIf(host.Solaris != nil, "solaris", "set", "a Linux container")
	t.refuseIf(host.Windows != nil, "windows", "set", "a Linux container")
	t.refuseIf(host.ZOS != nil, "zos", "set", "a Linux container")
	t.refuseIf(host.FreeBSD != nil, "freebsd", "set", "a Linux container")
	t.refuseIf(host.VM != nil, "vm", "set", "none, as the pod's VM is the controller's to shape")
	t.out.Spec = out
	if err := t.err(); err != nil {
		return nil, fmt.Errorf("container %q cannot run in a VM: %w", id, err)
	}
	return t.out, nil
}

// TranslateProcess makes the guest's process of an exec out of CRI's.
func TranslateProcess(host *specs.Process) (*specs.Process, error) {
	t := &translation{}
	out := t.process("process", host)
	if err := t.err(); err != nil {
		return nil, err
	}
	return out, nil
}

// TranslateResources makes the guest's resources of an update out of CRI's.
// Device rules are left out, as an update does not change them.
func TranslateResources(host *specs.LinuxResources) (*specs.LinuxResources, error) {
	t := &translation{}
	if host == nil {
		return nil, fmt.Errorf("resources are missing: %w", errdefs.ErrInvalidArgument)
	}
	out := t.resources(host)
	out.Devices = nil
	if err := t.err(); err != nil {
		return nil, err
	}
	return out, nil
}

// translation collects what one translation refuses.
type translation struct {
	pod     Pod
	out     *Container
	refused []error
}

func (t *translation) err() error {
	if len(t.refused) == 0 {
		return nil
	}
	return errors.Join(t.refused...)
}

// refuse notes that the value of a field has no place in a VM.
func (t *translation) refuse(field string, value any, want string) {
	t.refused = append(t.refused, fmt.Errorf("%s is %s: want %s: %w", field, quote(value), want, errdefs.ErrInvalidArgument))
}

func (t *translation) refuseIf(bad bool, field string, value any, want string) {
	if bad {
		t.refuse(field, value, want)
	}
}

func (t *translation) refuseString(field, value, want string) {
	t.refuseIf(value != "", field, value, want)
}

func quote(value any) string {
	s, ok := value.(string)
	if !ok {
		s = fmt.Sprint(value)
	}
	const most = 200
	if len(s) > most {
		s = s[:most] + "…"
	}
	return fmt.Sprintf("%q", s)
}

func (t *translation) root(in *specs.Root) *specs.Root {
	if in == nil {
		t.refuse("root", "missing", "a root file system")
		return nil
	}
	// Path is the bundle's and the host's.
	return &specs.Root{Path: rootPath, Readonly: in.Readonly}
}

func (t *translation) hooks(in *specs.Hooks) {
	if in == nil {
		return
	}
	for _, h := range []struct {
		name  string
		hooks []specs.Hook
	}{
		{"prestart", in.Prestart}, //nolint:staticcheck // deprecated, and refused
		{"createRuntime", in.CreateRuntime},
		{"createContainer", in.CreateContainer},
		{"startContainer", in.StartContainer},
		{"poststart", in.Poststart},
		{"poststop", in.Poststop},
	} {
		if len(h.hooks) > 0 {
			t.refuse("hooks."+h.name, h.hooks[0].Path, "none, as a hook is a program of the host")
		}
	}
}

// annotations leaves out those that steer crun: they name files and sockets in
// the VM that are not the container's.
func (t *translation) annotations(in map[string]string) map[string]string {
	var out map[string]string
	var size int
	for k, v := range in {
		size += len(k) + len(v)
		if strings.HasPrefix(k, "run.oci.") {
			continue
		}
		t.refuseIf(annotation.Unknown(k), "annotations."+k, v, "one of "+strings.Join(annotation.Names(), ", ")+", on the pod")
		if out == nil {
			out = make(map[string]string, len(in))
		}
		out[k] = v
	}
	t.refuseIf(size > maxAnnotationBytes, "annotations", fmt.Sprintf("%d bytes", size),
		fmt.Sprintf("at most %d bytes", maxAnnotationBytes))
	return out
}
