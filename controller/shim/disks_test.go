// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/cloudhv/containerd-cloudhv/controller/directvolume"
	hostv1 "github.com/cloudhv/containerd-cloudhv/controller/hostapi/v1"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// withDevice gives a spec the block device 8:16.
func withDevice(access string) func(*specs.Spec) {
	return func(s *specs.Spec) {
		major, minor := int64(8), int64(16)
		s.Linux.Devices = append(s.Linux.Devices, specs.LinuxDevice{Path: "/dev/xvda", Type: "b", Major: major, Minor: minor})
		s.Linux.Resources.Devices = append(s.Linux.Resources.Devices,
			specs.LinuxDeviceCgroup{Allow: true, Type: "b", Major: &major, Minor: &minor, Access: access})
	}
}

// createWith makes a container whose spec is changed.
func (p *pod) createWith(id string, change func(*specs.Spec)) error {
	p.t.Helper()
	_, err := p.client.Create(testContext(p.t), &taskapi.CreateTaskRequest{ID: id, Bundle: p.bundle(id, change, "sleep")})
	return native(err)
}

// asked are the requests about disks since the last call.
func (p *pod) asked() []any {
	p.daemon.mu.Lock()
	defer p.daemon.mu.Unlock()
	asked := p.daemon.disks
	p.daemon.disks = nil
	return asked
}

func (p *pod) lastCreated() (*guestv1.CreateRequest, *specs.Spec) {
	p.t.Helper()
	p.guest.mu.Lock()
	defer p.guest.mu.Unlock()
	require.NotEmpty(p.t, p.guest.created)
	r := p.guest.created[len(p.guest.created)-1]
	var spec specs.Spec
	require.NoError(p.t, json.Unmarshal(r.Spec, &spec))
	return r, &spec
}

func requireSame(t *testing.T, want, got any) {
	t.Helper()
	require.Empty(t, cmp.Diff(want, got, protocmp.Transform()))
}

var detachC = &hostv1.DetachDisksRequest{SandboxId: "sb", ContainerId: "c"}

// The plugin is asked for a container's block devices, and to take them away when it is
// deleted.
func TestDevices(t *testing.T) {
	p := newPod(t)
	p.create("plain", nil, "exit", "0")
	p.delete("plain", "")
	require.Empty(t, p.asked(), "who has no disks costs nothing")

	require.NoError(t, p.createWith("c", withDevice("rm")))
	attach := &hostv1.AttachDisksRequest{SandboxId: "sb", ContainerId: "c", Disks: []*hostv1.Disk{{Major: 8, Minor: 16, ReadOnly: true}}}
	requireSame(t, []any{attach}, p.asked())
	r, spec := p.lastCreated()
	requireSame(t, []*guestv1.DiskDevice{{Serial: "c-0", Path: "/dev/xvda", Access: "rm", Mode: 0o666}}, r.Devices)
	for _, d := range spec.Linux.Devices {
		require.NotEqual(t, "b", d.Type)
	}
	p.delete("c", "")
	requireSame(t, []any{detachC}, p.asked())
}

// What failed half-way is given up too.
func TestDevicesFail(t *testing.T) {
	p := newPod(t)
	p.guest.failing("Create", errdefs.ErrUnavailable)
	require.Error(t, p.createWith("c", withDevice("rwm")))
	asked := p.asked()
	require.Len(t, asked, 2)
	requireSame(t, detachC, asked[1])
	p.guest.fine()

	p.daemon.onDisks = func(r any) error {
		if _, ok := r.(*hostv1.AttachDisksRequest); ok {
			return fmt.Errorf("block device 8:16: the host has no such device: %w", errdefs.ErrInvalidArgument)
		}
		return nil
	}
	err := p.createWith("c", withDevice("rwm"))
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, `disks of container "c": block device 8:16: the host has no such device`)
	requireSame(t, detachC, p.asked()[1])

	// A plugin that cannot take them away costs no delete.
	p.daemon.onDisks = func(r any) error {
		if _, ok := r.(*hostv1.DetachDisksRequest); ok {
			return errdefs.ErrInternal
		}
		return nil
	}
	require.NoError(t, p.createWith("c", withDevice("rwm")))
	p.delete("c", "")
	require.Len(t, p.asked(), 2)
}

// Mounts of direct volumes come from the VM's disks, and others from where they came before.
func TestDirectVolumes(t *testing.T) {
	p := newPod(t)
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "file"), nil, 0o600))
	const kubelet = "/var/lib/kubelet/pods/1-2/volumes/kubernetes.io~empty-dir/cache"
	p.svc.cfg.PodUID = "1-2"
	p.svc.cfg.DirectVolumes = []directvolume.Volume{
		{Volume: "/mnt/unused", Device: "/x", FSType: "erofs"},
		{Volume: "/mnt/data", Device: "/y", FSType: "ext4", Options: []string{"rw", "noatime"}},
		{Volume: "cache", Device: "/z", FSType: "xfs", Options: []string{"ro"}},
	}
	bind := func(source, destination string, options ...string) specs.Mount {
		return specs.Mount{Type: "bind", Source: source, Destination: destination, Options: append([]string{"rbind"}, options...)}
	}
	require.NoError(t, p.createWith("c", func(s *specs.Spec) {
		s.Mounts = append(s.Mounts, bind("/mnt/data/", "/a", "rprivate", "rw"), bind(filepath.Join(dir, "file"), "/b", "ro"),
			bind("/mnt/data/sub", "/c", "rprivate", "ro", "noexec"), bind(kubelet, "/d", "rro"))
	}))
	requireSame(t, []any{&hostv1.AttachDisksRequest{
		SandboxId: "sb", ContainerId: "c", Disks: []*hostv1.Disk{{DirectVolume: 2}, {DirectVolume: 3}},
	}}, p.asked())
	r, spec := p.lastCreated()
	requireSame(t, []*guestv1.DiskVolume{
		{Serial: "volume-2", FsType: "ext4", Options: []string{"noatime"}}, {Serial: "volume-3", FsType: "xfs", ReadOnly: true},
	}, r.Volumes)
	got := spec.Mounts[len(spec.Mounts)-4:]
	require.Equal(t, "/run/volumes/1", got[1].Source)
	got[1].Source, got[1].Options = "", nil
	require.Equal(t, []specs.Mount{
		{Type: "bind", Source: "/run/disks/volume-2", Destination: "/a", Options: []string{"rbind", "rprivate", "rw"}},
		{Type: "bind", Destination: "/b"},
		{Type: "bind", Source: "/run/disks/volume-2/sub", Destination: "/c", Options: []string{"rbind", "rprivate", "ro", "noexec"}},
		{Type: "bind", Source: "/run/disks/volume-3", Destination: "/d", Options: []string{"rbind", "rprivate", "ro"}},
	}, got)
	p.delete("c", "")
	requireSame(t, []any{detachC}, p.asked())

	for source, want := range map[string]string{
		"/var/lib/kubelet/pods/1-2/volume-subpaths/cache/c/0": `is a subPath of the direct volume "cache"`,
		"/mnt/data": "propagation HostToContainer",
	} {
		err := p.createWith("c", func(s *specs.Spec) { s.Mounts = append(s.Mounts, bind(source, "/a", "rslave")) })
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		require.ErrorContains(t, err, want)
		require.ErrorContains(t, err, `mount "/a"`)
	}
	require.Empty(t, p.asked())
}
