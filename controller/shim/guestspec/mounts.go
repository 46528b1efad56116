// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package guestspec

import (
	"fmt"
	"path"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// devShm is where a container has its POSIX shared memory.
const devShm = "/dev/shm"

// Bind is a bind mount of the host's spec.
type Bind struct {
	// Source on the host and Destination in the container, both absolute.
	Source, Destination string
	Readonly            bool
}

// kernelMounts are the file systems that a guest's kernel mounts without a
// device of its own.
var kernelMounts = []string{"proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"}

// mounts returns those that the guest does as they are. Bind mounts go to
// Container.Binds, and CRI's default /dev/shm goes: the pod has one for all.
func (t *translation) mounts(in []specs.Mount) []specs.Mount {
	var out []specs.Mount
	for _, m := range in {
		field := fmt.Sprintf("mount %q", m.Destination)
		if !path.IsAbs(m.Destination) || strings.ContainsRune(m.Destination, 0) {
			t.refuse(field, m.Destination, "an absolute path")
			continue
		}
		if t.idmapped(field, m) {
			continue
		}
		switch {
		case m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind"):
			t.bind(field, m)
		case defaultShm(m):
		case slices.Contains(kernelMounts, m.Type):
			if path.Clean(m.Destination) == devShm {
				t.out.PrivateShm = true
			}
			out = append(out, specs.Mount{
				Destination: m.Destination,
				Type:        m.Type,
				Source:      m.Source,
				Options:     mountOptions(m),
			})
		default:
			t.refuse(field+" type", m.Type, "bind or one of "+strings.Join(kernelMounts, ", "))
		}
	}
	return out
}

func (t *translation) idmapped(field string, m specs.Mount) bool {
	const want = "none, as ID-mapped mounts are not carried into a VM yet"
	n := len(t.refused)
	t.refuseIf(len(m.UIDMappings) > 0, field+" uidMappings", m.UIDMappings, want)
	t.refuseIf(len(m.GIDMappings) > 0, field+" gidMappings", m.GIDMappings, want)
	for _, o := range m.Options {
		name, _, _ := strings.Cut(o, "=")
		t.refuseIf(name == "idmap" || name == "ridmap", field+" option", o, want)
	}
	return len(t.refused) > n
}

// bind takes a bind mount as it will be looked at: what its source is decides
// ReadFiles.
func (t *translation) bind(field string, m specs.Mount) {
	if !path.IsAbs(m.Source) {
		t.refuse(field+" source", m.Source, "an absolute path")
		return
	}
	b := Bind{Source: m.Source, Destination: m.Destination}
	for _, o := range m.Options {
		switch o {
		case "ro", "rro":
			b.Readonly = true
		case "shared", "rshared":
			t.refuse(field+" option", o, "private or slave propagation, as a mount in a VM does not reach the host")
		}
	}
	t.out.Binds = append(t.out.Binds, b)
}

// defaultShm recognizes the /dev/shm that containerd puts into every spec.
func defaultShm(m specs.Mount) bool {
	return path.Clean(m.Destination) == devShm && m.Type == "tmpfs" && m.Source == "shm" &&
		slices.Equal(m.Options, []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"})
}

// mountOptions leaves out what CRI copies from the host's cgroup mount for
// containers without a cgroup namespace; in a VM each has one.
func mountOptions(m specs.Mount) []string {
	if m.Type != "cgroup" && m.Type != "cgroup2" {
		return m.Options
	}
	var out []string
	for _, o := range m.Options {
		if o != "nsdelegate" && o != "memory_recursiveprot" {
			out = append(out, o)
		}
	}
	return out
}
