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

// kernelMounts are the file systems that a guest's kernel mounts without a
// device of its own.
var kernelMounts = []string{"proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"}

// mounts returns those that the guest does as they are. Bind mounts
// have the host's source still, and CRI's default /dev/shm goes: the pod has one for all.
func (t *translation) mounts(in []specs.Mount) []specs.Mount {
	var out []specs.Mount
	for _, m := range in {
		field := fmt.Sprintf("mount %q", m.Destination)
		if !path.IsAbs(m.Destination) || strings.ContainsRune(m.Destination, 0) {
			t.refuse(field, m.Destination, "an absolute path")
			continue
		}
		if t.refusesIDs(field, m) {
			continue
		}
		switch {
		case isBind(m):
			if b, ok := t.bind(field, m); ok {
				out = append(out, b)
			}
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

// refusesIDs checks the ID mappings of a mount, which package volumes does for those of
// the host's files.
func (t *translation) refusesIDs(field string, m specs.Mount) bool {
	n := len(t.refused)
	for _, ids := range []struct {
		field string
		ids   []specs.LinuxIDMapping
	}{{field + " uidMappings", m.UIDMappings}, {field + " gidMappings", m.GIDMappings}} {
		switch {
		case len(m.UIDMappings)+len(m.GIDMappings) == 0:
		case !isBind(m):
			t.refuseIf(len(ids.ids) > 0, ids.field, ids.ids, "none, as the files of this mount are the VM's own")
		case len(ids.ids) == 0:
			t.refuse(ids.field, ids.ids, "mappings of both, users and groups, or of none")
		case len(ids.ids) > maxIDMappings:
			t.refuse(ids.field, fmt.Sprintf("%d mappings", len(ids.ids)), fmt.Sprintf("at most %d", maxIDMappings))
		}
	}
	for _, o := range m.Options {
		name, _, _ := strings.Cut(o, "=")
		t.refuseIf(name == "idmap" || name == "ridmap", field+" option", o, "uidMappings and gidMappings instead")
	}
	return len(t.refused) > n
}

// maxIDMappings is how many the kernel takes for a user namespace.
const maxIDMappings = 340

func isBind(m specs.Mount) bool {
	return m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
}

// bindOptions are those of a bind mount that have a meaning in a VM.
var bindOptions = []string{
	"bind", "rbind", "private", "rprivate", "slave", "rslave", "ro", "rro", "rw",
	"nosuid", "suid", "nodev", "dev", "noexec", "exec", "noatime", "atime", "nodiratime", "diratime", "relatime", "norelatime", "strictatime",
}

// bind checks a bind mount. What its source is decides package volumes.
func (t *translation) bind(field string, m specs.Mount) (specs.Mount, bool) {
	n := len(t.refused)
	t.refuseIf(!path.IsAbs(m.Source) || strings.ContainsRune(m.Source, 0), field+" source", m.Source, "an absolute path")
	// CRI makes this of a container's host IPC. By 9p it would be files, and no memory that is shared.
	t.refuseIf(path.Clean(m.Source) == devShm && path.Clean(m.Destination) == devShm, field+" source", m.Source,
		"the pod's own, as a VM cannot share the host's memory (hostIPC)")
	for _, o := range m.Options {
		switch {
		case o == "shared" || o == "rshared":
			t.refuse(field+" option", o, "private or slave propagation, as a mount in a VM does not reach the host")
		case !slices.Contains(bindOptions, o):
			t.refuse(field+" option", o, "some of "+strings.Join(bindOptions, ", "))
		}
	}
	return specs.Mount{
		Destination: m.Destination, Type: "bind", Source: m.Source, Options: m.Options,
		UIDMappings: m.UIDMappings, GIDMappings: m.GIDMappings,
	}, len(t.refused) == n
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
