// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package guestspec

import (
	"fmt"
	"os"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
)

func withDisks(disks []specs.LinuxDevice, rules ...specs.LinuxDeviceCgroup) *specs.Spec {
	host := fullSpec()
	host.Linux.Devices = append(host.Linux.Devices, disks...)
	host.Linux.Resources.Devices = append(host.Linux.Resources.Devices, rules...)
	return host
}

func rule(major, minor int64, access string) specs.LinuxDeviceCgroup {
	return specs.LinuxDeviceCgroup{Allow: true, Type: "b", Major: &major, Minor: &minor, Access: access}
}

// TestDisks checks that a block device gets into no spec, and what is kept of it.
func TestDisks(t *testing.T) {
	t.Parallel()
	mode, uid, gid := os.FileMode(0o640), uint32(3), uint32(6)
	plain, err := Translate(fullSpec(), "c", Pod{SandboxPid: testPid})
	require.NoError(t, err)
	require.Empty(t, plain.Disks)
	got, err := Translate(withDisks([]specs.LinuxDevice{
		{Path: "/dev/xvda", Type: "b", Major: 7, Minor: 1, FileMode: &mode, UID: &uid, GID: &gid},
		{Path: "/dev/again", Type: "b", Major: 7, Minor: 1},
		{Path: "/dev/read", Type: "b", Major: 259, Minor: maxMinor},
		{Path: "/dev/none", Type: "b", Major: 8},
	}, rule(7, 1, "r"), rule(7, 1, "wm"), rule(259, maxMinor, "rm")), "c", Pod{SandboxPid: testPid})
	require.NoError(t, err)
	require.Equal(t, plain.Spec, got.Spec)
	require.Equal(t, []Disk{
		{Path: "/dev/xvda", Major: 7, Minor: 1, Access: "rwm", Mode: 0o640, UID: 3, GID: 6},
		{Path: "/dev/again", Major: 7, Minor: 1, Access: "rwm", Mode: 0o666},
		{Path: "/dev/read", Major: 259, Minor: maxMinor, Access: "rm", Mode: 0o666},
		{Path: "/dev/none", Major: 8, Mode: 0o666},
	}, got.Disks)
	require.Equal(t, []bool{false, false, true, true}, []bool{
		got.Disks[0].ReadOnly(), got.Disks[1].ReadOnly(), got.Disks[2].ReadOnly(), got.Disks[3].ReadOnly(),
	})
}

func TestDisksRefused(t *testing.T) {
	t.Parallel()
	ids := []specs.LinuxIDMapping{{HostID: 65536, Size: 65536}}
	many := make([]specs.LinuxDevice, maxDisks+1)
	for i := range many {
		many[i] = specs.LinuxDevice{Path: fmt.Sprintf("/dev/d%d", i), Type: "b", Major: 8, Minor: int64(i)}
	}
	disk := specs.LinuxDevice{Path: "/dev/xvda", Type: "b", Major: 8}
	for name, tc := range map[string]struct {
		host *specs.Spec
		want string
	}{
		"a number below 0":   {withDisks([]specs.LinuxDevice{{Path: "/dev/xvda", Type: "b", Major: -1}}), "/dev/xvda (b -1:0)"},
		"a number too large": {withDisks([]specs.LinuxDevice{{Path: "/dev/xvda", Type: "b", Minor: maxMinor + 1}}), "up to 4095:1048575"},
		"a relative path":    {withDisks([]specs.LinuxDevice{{Path: "xvda", Type: "b", Major: 8}}), "an absolute path"},
		"too many":           {withDisks(many), "at most 64 block devices"},
		"a user namespace": {func() *specs.Spec {
			host := withDisks([]specs.LinuxDevice{disk}, rule(8, 0, "rwm"))
			host.Linux.Namespaces = append(host.Linux.Namespaces, specs.LinuxNamespace{
				Type: specs.UserNamespace, Path: fmt.Sprintf("/proc/%d/ns/user", testPid),
			})
			host.Linux.UIDMappings, host.Linux.GIDMappings = ids, ids
			return host
		}(), "no block device in a pod with a user namespace"},
		"a rule of no device":       {withDisks([]specs.LinuxDevice{disk}, rule(8, 1, "rwm")), "b 8:1"},
		"another device of no disk": {withDisks([]specs.LinuxDevice{{Path: "/dev/sg0", Type: "c", Major: 21}}), "/dev/sg0 (c 21:0)"},
	} {
		_, err := Translate(tc.host, "c", Pod{SandboxPid: testPid})
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, name)
		require.ErrorContains(t, err, tc.want, name)
	}
}
