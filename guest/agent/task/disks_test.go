// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package task

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/disk"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// TestAddDevices checks that a spec gets a node with the number that a disk has here, and a
// rule for that number.
func TestAddDevices(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("nodes of devices are root's to make")
	}
	sys, dev := t.TempDir(), t.TempDir()
	for i, serial := range []string{"dev-8-0", "dev-8-0-r"} {
		name := "vd" + string(rune('a'+i))
		require.NoError(t, os.MkdirAll(filepath.Join(sys, "block", name), 0o700))
		require.NoError(t, os.WriteFile(filepath.Join(sys, "block", name, "serial"), []byte(serial), 0o600))
		require.NoError(t, unix.Mknod(filepath.Join(dev, name), unix.S_IFBLK|0o600, int(unix.Mkdev(254, uint32(16*i)))))
	}
	c := &container{s: &Service{cfg: Config{Disks: disk.Finder{Sys: sys, Dev: dev}}}}
	spec := &specs.Spec{Linux: &specs.Linux{}}
	require.NoError(t, c.addDevices(t.Context(), []*guestv1.DiskDevice{
		{Serial: "dev-8-0", Path: "/dev/xvda", Access: "rwm", Mode: 0o660, Uid: 1, Gid: 6},
		{Serial: "dev-8-0-r", Path: "/dev/xvdb", Access: "r", Mode: 0o600},
		{Serial: "dev-8-0", Path: "/dev/none"},
	}, spec))
	major, first, second := int64(254), int64(0), int64(16)
	all, own := os.FileMode(0o660), os.FileMode(0o600)
	one, six, root, none := uint32(1), uint32(6), uint32(0), os.FileMode(0)
	require.Equal(t, []specs.LinuxDevice{
		{Path: "/dev/xvda", Type: "b", Major: major, Minor: first, FileMode: &all, UID: &one, GID: &six},
		{Path: "/dev/xvdb", Type: "b", Major: major, Minor: second, FileMode: &own, UID: &root, GID: &root},
		{Path: "/dev/none", Type: "b", Major: major, Minor: first, FileMode: &none, UID: &root, GID: &root},
	}, spec.Linux.Devices)
	require.Equal(t, []specs.LinuxDeviceCgroup{
		{Allow: true, Type: "b", Major: &major, Minor: &first, Access: "rwm"},
		{Allow: true, Type: "b", Major: &major, Minor: &second, Access: "r"},
	}, spec.Linux.Resources.Devices)
	require.ErrorIs(t, c.addDevices(t.Context(), []*guestv1.DiskDevice{{Serial: "../x", Path: "/dev/x"}}, spec), errdefs.ErrInvalidArgument)
}

func TestCheckDisks(t *testing.T) {
	t.Parallel()
	require.NoError(t, checkDisks(&guestv1.CreateRequest{Devices: []*guestv1.DiskDevice{{Path: "/dev/x", Access: "rwm"}, {Path: "/y"}}}))
	for name, r := range map[string]*guestv1.CreateRequest{
		"a relative path": {Devices: []*guestv1.DiskDevice{{Path: "dev/x"}}},
		"a path's end":    {Devices: []*guestv1.DiskDevice{{Path: "/dev/x\x00y"}}},
		"an access":       {Devices: []*guestv1.DiskDevice{{Path: "/dev/x", Access: "rx"}}},
		"too many":        {Devices: make([]*guestv1.DiskDevice, maxDisks+1)},
		"too many still":  {Volumes: make([]*guestv1.DiskVolume, maxDisks+1)},
	} {
		require.ErrorIs(t, checkDisks(r), errdefs.ErrInvalidArgument, name)
	}
}
