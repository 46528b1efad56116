// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package guestspec

import (
	"fmt"
	"path"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Disk is a block device of the host's that a container has.
type Disk struct {
	// Path is the node's in the container.
	Path string
	// Major and Minor are the device's numbers on the host.
	Major, Minor uint32
	// Access is what its cgroup lets the container do with it: some of r, w and m.
	Access string
	// Mode, UID and GID are the node's.
	Mode, UID, GID uint32
}

// ReadOnly is true if the container may not write.
func (d Disk) ReadOnly() bool { return !strings.Contains(d.Access, "w") }

// Bounds of the kernel's device numbers.
const (
	maxMajor = 1<<12 - 1
	maxMinor = 1<<20 - 1
	// maxDisks is how many the agent takes.
	maxDisks = 64
)

// disk takes a block device, which is to become a disk of the VM. In a user namespace a
// runtime makes no nodes, and Kubernetes has none.
func (t *translation) disk(d specs.LinuxDevice, userNamespace bool) {
	value := fmt.Sprintf("%s (b %d:%d)", d.Path, d.Major, d.Minor)
	switch {
	case !path.IsAbs(d.Path) || strings.ContainsRune(d.Path, 0):
		t.refuse("linux.devices", value, "an absolute path")
		return
	case d.Major < 0 || d.Major > maxMajor || d.Minor < 0 || d.Minor > maxMinor:
		t.refuse("linux.devices", value, fmt.Sprintf("numbers up to %d:%d", maxMajor, maxMinor))
		return
	case userNamespace:
		t.refuse("linux.devices", value, "no block device in a pod with a user namespace")
		return
	case len(t.out.Disks) == maxDisks:
		t.refuse("linux.devices", value, fmt.Sprintf("at most %d block devices", maxDisks))
		return
	}
	disk := Disk{Path: d.Path, Major: uint32(d.Major), Minor: uint32(d.Minor), Mode: 0o666}
	if d.FileMode != nil {
		disk.Mode = uint32(d.FileMode.Perm())
	}
	if d.UID != nil {
		disk.UID = *d.UID
	}
	if d.GID != nil {
		disk.GID = *d.GID
	}
	t.out.Disks = append(t.out.Disks, disk)
}

// allowDisk takes a rule of the cgroup that lets a container use one of its disks. The
// agent makes its own of it, as the number in the VM is another.
func (t *translation) allowDisk(r specs.LinuxDeviceCgroup) bool {
	if t.out == nil || !r.Allow || r.Type != "b" || r.Major == nil || r.Minor == nil {
		return false
	}
	found := false
	for i := range t.out.Disks {
		d := &t.out.Disks[i]
		if int64(d.Major) != *r.Major || int64(d.Minor) != *r.Minor {
			continue
		}
		found = true
		for _, may := range []string{"r", "w", "m"} {
			if strings.Contains(r.Access, may) && !strings.Contains(d.Access, may) {
				d.Access += may
			}
		}
	}
	return found
}
