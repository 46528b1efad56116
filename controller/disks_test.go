// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/controller/annotation"
	hostv1 "github.com/cloudhv/containerd-cloudhv/controller/hostapi/v1"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmmtest"
)

// testDevice is a block device of a test's, as a shim asks for it.
type testDevice struct {
	number [2]uint32
	node   string
}

func newTestDevice(t *testing.T, readOnly bool) testDevice {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("nodes of devices are root's to make")
	}
	node, _ := vmmtest.LoopDevice(t, 1<<20, 512, readOnly)
	var st unix.Stat_t
	require.NoError(t, unix.Stat(node, &st))
	return testDevice{[2]uint32{unix.Major(st.Rdev), unix.Minor(st.Rdev)}, node}
}

func (d testDevice) String() string { return fmt.Sprintf("%d:%d", d.number[0], d.number[1]) }

func (d testDevice) asked(readOnly bool) *hostv1.Disk {
	return &hostv1.Disk{Major: d.number[0], Minor: d.number[1], ReadOnly: readOnly}
}

func (d testDevice) serial() string { return fmt.Sprintf("dev-%d-%d", d.number[0], d.number[1]) }

func (n *node) attach(sandbox, container string, disks ...*hostv1.Disk) ([]string, error) {
	resp, err := n.HostService().AttachDisks(n.ctx(), &hostv1.AttachDisksRequest{SandboxId: sandbox, ContainerId: container, Disks: disks})
	return resp.GetSerials(), errgrpc.ToNative(err)
}

func (n *node) detach(sandbox, container string) error {
	_, err := n.HostService().DetachDisks(n.ctx(), &hostv1.DetachDisksRequest{SandboxId: sandbox, ContainerId: container})
	return errgrpc.ToNative(err)
}

// plugged are the serials of the disks that the only machine has.
func (n *node) plugged() map[string]int {
	n.t.Helper()
	return n.driver.only(n.t).disks
}

// nodes are those of block devices that are left.
func (n *node) nodes() []string {
	n.t.Helper()
	left, err := filepath.Glob(filepath.Join(n.cfg.CacheDir, blockNodesDir, "*"))
	require.NoError(n.t, err)
	return left
}

// A device is plugged in once for all containers that have it alike, also by a containerd
// that comes back, and unplugged after the last.
func TestBlockDevicesAreShared(t *testing.T) {
	d, fixed := newTestDevice(t, false), newTestDevice(t, true)
	n := newNode(t)
	for _, c := range []string{"c1", "c2", "c3"} {
		n.containers.sandbox[c] = "a"
	}
	n.run("a")
	for range 2 { // who asks again gets the same
		serials, err := n.attach("a", "c1", d.asked(false), fixed.asked(false))
		require.NoError(t, err)
		require.Equal(t, []string{d.serial(), fixed.serial() + "-r"}, serials)
	}
	require.Equal(t, []vmm.Disk{
		{Serial: d.serial(), Path: d.String()}, {Serial: fixed.serial() + "-r", Path: fixed.String(), ReadOnly: true},
	}, n.driver.only(t).added)
	n.restart()
	serials, err := n.attach("a", "c2", d.asked(false))
	require.NoError(t, err)
	require.Equal(t, []string{d.serial()}, serials)
	serials, err = n.attach("a", "c3", d.asked(true))
	require.NoError(t, err)
	require.Equal(t, []string{d.serial() + "-r"}, serials)
	require.Equal(t, vmm.Disk{Serial: d.serial() + "-r", Path: d.String(), ReadOnly: true}, n.driver.only(t).added[2])

	require.NoError(t, n.detach("a", "c1"))
	require.Equal(t, map[string]int{d.serial(): 1, d.serial() + "-r": 1}, n.plugged())
	n.restart()
	for range 2 {
		require.NoError(t, n.detach("a", "c2"))
		require.NoError(t, n.detach("a", "c3"))
		require.NoError(t, n.detach("none", "c3"))
	}
	require.Empty(t, n.plugged())
	require.Empty(t, n.nodes())
	_, err = n.attach("a", "c1", d.asked(false))
	require.NoError(t, err)
	require.NoError(t, n.Stop(n.ctx(), "a"))
	require.NoError(t, n.detach("a", "c1"), "it has gone with the VM")
	require.NoError(t, n.Shutdown(n.ctx(), "a"))
	n.requireNothing()
}

func TestBlockDevicesRefused(t *testing.T) {
	d := newTestDevice(t, false)
	n := newNode(t)
	n.containers.sandbox["c1"], n.containers.sandbox["other"] = "a", "b"
	n.run("a")
	_, err := n.attach("none", "c1", d.asked(false))
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	_, err = n.attach("a", "none", d.asked(false))
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	_, err = n.attach("a", "other", d.asked(false))
	require.ErrorContains(t, err, `is of sandbox "b", not "a"`)
	_, err = n.attach("a", "c1", &hostv1.Disk{Major: 4095, Minor: 1048575})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, "block device 4095:1048575: the host has no such device")
	_, err = n.attach("a", "c1", &hostv1.Disk{DirectVolume: 1})
	require.ErrorContains(t, err, "direct volume 1: the pod has 0")
	p, err := n.get("a")
	require.NoError(t, err)
	require.Empty(t, p.snapshot().Disks)
	require.Empty(t, n.nodes())
}

// requireDoubtful checks that a sandbox's VM may have a device, and no container.
func requireDoubtful(t *testing.T, p *pod, d testDevice) {
	t.Helper()
	got, ok := p.snapshot().Disks[d.serial()]
	require.True(t, ok)
	require.False(t, got.Plugged)
	require.Empty(t, got.Containers)
}

// A plugging that fails is undone, and one of which nobody knows is before the next.
func TestBlockDeviceFails(t *testing.T) {
	d := newTestDevice(t, false)
	for name, restart := range map[string]bool{"": false, "containerd ends": true} {
		n := newNode(t)
		n.containers.sandbox["c1"], n.containers.sandbox["c2"] = "a", "a"
		p := n.run("a")
		n.driver.vm.disk = errInjected
		_, err := n.attach("a", "c1", d.asked(false))
		require.ErrorIs(t, err, errdefs.ErrResourceExhausted, name)
		require.ErrorContains(t, err, "plug in block device "+d.String())
		require.Empty(t, p.snapshot().Disks)

		n.driver.vm.disk, n.driver.vm.diskStays = fmt.Errorf("who knows: %w", errdefs.ErrUnknown), true
		_, err = n.attach("a", "c1", d.asked(false))
		require.Error(t, err)
		requireDoubtful(t, p, d)
		require.Equal(t, map[string]int{d.serial(): 1}, n.plugged())
		n.driver.vm.disk = nil
		if restart {
			n.restart()
			p = n.all()[0]
		}
		_, err = n.attach("a", "c2", d.asked(false))
		require.NoError(t, err, "the other was unplugged before")
		require.Equal(t, map[string]int{d.serial(): 1}, n.plugged())

		n.driver.vm.unplug = errInjected
		require.ErrorIs(t, n.detach("a", "c2"), errdefs.ErrResourceExhausted)
		requireDoubtful(t, p, d)
		n.driver.vm.unplug = nil
		require.NoError(t, n.detach("a", "c1"), "whoever comes next takes it away")
		require.Empty(t, n.plugged())
		require.Empty(t, p.snapshot().Disks)
		require.Empty(t, n.nodes())
		require.NoError(t, n.Shutdown(n.ctx(), "a"))
	}
}

// What an earlier containerd was about to plug in leaves no node.
func TestBlockNodesAreCleared(t *testing.T) {
	n := newNode(t)
	dir := filepath.Join(n.cfg.CacheDir, blockNodesDir)
	require.NoError(t, os.MkdirAll(dir, 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "7"), nil, 0o600))
	n.restart()
	require.Empty(t, n.nodes())
}

// withVolumes creates and starts a sandbox with direct volumes.
func (n *node) withVolumes(id, value string) error {
	n.sandboxes.mu.Lock()
	n.sandboxes.known[id] = true
	n.sandboxes.mu.Unlock()
	err := n.Create(n.ctx(), sandbox.Sandbox{ID: id}, sandbox.WithNetNSPath("/netns/"+id), sandbox.WithOptions(&runtime.PodSandboxConfig{
		Metadata:    &runtime.PodSandboxMetadata{Uid: "uid-" + id},
		Annotations: map[string]string{annotation.Own + annotation.DirectVolumes: value},
	}))
	if err != nil {
		return err
	}
	_, err = n.Start(n.ctx(), id)
	return err
}

// image makes a file for a volume to be on.
func image(t *testing.T, dir, name string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	require.NoError(t, os.WriteFile(path, make([]byte, 1<<20), 0o600))
	return path
}

func volumeOn(device, more string) string {
	return fmt.Sprintf(`[{"volume":"data","device":%q,"fstype":"ext4"%s}]`, device, more)
}

func TestDirectVolumesAreAllowed(t *testing.T) {
	n := newNode(t)
	dir, err := filepath.EvalSymlinks(t.TempDir())
	require.NoError(t, err)
	inside, outside := filepath.Join(dir, "inside"), filepath.Join(dir, "outside")
	require.NoError(t, os.Mkdir(inside, 0o700))
	require.NoError(t, os.Mkdir(outside, 0o700))
	good, bad := image(t, inside, "good"), image(t, outside, "bad")
	link, back := filepath.Join(inside, "link"), filepath.Join(outside, "back")
	require.NoError(t, os.Symlink(bad, link))
	require.NoError(t, os.Symlink(good, back))
	alias := filepath.Join(dir, "alias")
	require.NoError(t, os.Symlink("inside", alias))

	key := "io.cloudhv.direct_volumes"
	err = n.withVolumes("a", volumeOn(good, ""))
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, "annotation "+key+" = ")
	require.ErrorContains(t, err, "this node's configuration allows no direct volumes (direct_volumes)")
	for _, tc := range []struct {
		allowed, device, want string
	}{
		{inside, good, ""},
		{inside + "/", good, ""},
		{good, good, ""},
		{alias, good, ""},
		{inside + "/go*", good, ""},
		{alias + "/go*", good, ""},
		{inside, back, ""},
		{inside, bad, "it is " + bad + ", where this node's configuration allows none (direct_volumes)"},
		{inside, link, "it is " + bad + ", where"},
		{inside, inside + "/../outside/bad", "it is " + bad + ", where"},
		{inside + "/ba*", good, "it is " + good + ", where"},
		{dir + "/in", good, "it is " + good + ", where"},
		{inside, inside + "/none", "no such file"},
		{inside, inside, "no block device and no regular file"},
	} {
		n.cfg.DirectVolumes = []string{tc.allowed}
		err := n.withVolumes("a", volumeOn(tc.device, ""))
		if tc.want == "" {
			require.NoError(t, err, "%+v", tc)
			require.NoError(t, n.Shutdown(n.ctx(), "a"))
			continue
		}
		require.ErrorContains(t, err, key+": device ", "%+v", tc)
		require.ErrorContains(t, err, tc.want, "%+v", tc)
	}
	n.cfg.DirectVolumes = []string{dir}
	require.ErrorContains(t, n.withVolumes("a", "data"), "must be a list of volumes in JSON")
	twice := fmt.Sprintf(`[{"volume":"x","device":%q,"fstype":"ext4"},{"volume":"y","device":%q,"fstype":"ext4"}]`, good, back)
	require.ErrorContains(t, n.withVolumes("a", twice), `it is that of volume "x" too`)
	n.requireNothing()
}

// Direct volumes are plugged in for the containers that mount them, and for one pod only
// that may write.
func TestDirectVolumes(t *testing.T) {
	d := newTestDevice(t, false)
	n := newNode(t)
	maps.Copy(n.containers.sandbox, map[string]string{"c1": "a", "c2": "a", "d1": "b"})
	dir := t.TempDir()
	n.cfg.DirectVolumes = []string{dir, d.node}
	file := image(t, dir, "file")
	volume := &hostv1.Disk{DirectVolume: 1}
	for name, device := range map[string]string{"file": file, "device": d.node} {
		require.NoError(t, n.withVolumes("a", volumeOn(device, "")), name)
		a := n.driver.only(t)
		for _, c := range []string{"c1", "c2"} {
			serials, err := n.attach("a", c, volume)
			require.NoError(t, err)
			require.Equal(t, []string{"volume-1"}, serials)
		}
		require.Len(t, a.added, 1)
		require.Equal(t, "volume-1", a.added[0].Serial)
		require.NotEqual(t, device, a.added[0].Path, "it is a block device by then")

		require.NoError(t, n.withVolumes("b", volumeOn(device, `,"options":["ro"]`)))
		_, err := n.attach("b", "d1", volume)
		require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
		require.ErrorContains(t, err, `direct volume "data" on `+device+`: sandbox "a" has it`)
		require.NoError(t, n.detach("a", "c1"))
		require.Len(t, a.disks, 1)
		require.NoError(t, n.detach("a", "c2"))
		require.Empty(t, a.disks)
		_, err = n.attach("b", "d1", volume)
		require.NoError(t, err)
		_, err = n.attach("a", "c1", volume)
		require.ErrorContains(t, err, `sandbox "b" has it, and one of the two writes`)
		require.NoError(t, n.Stop(n.ctx(), "b"))
		_, err = n.attach("a", "c1", volume)
		require.NoError(t, err, "who has ended has nothing")
		require.NoError(t, n.Shutdown(n.ctx(), "a"))
		require.NoError(t, n.Shutdown(n.ctx(), "b"))
		require.Empty(t, n.nodes())
	}

	// Readers share.
	for c, pod := range map[string]string{"c1": "a", "d1": "b"} {
		require.NoError(t, n.withVolumes(pod, volumeOn(file, `,"options":["ro"]`)))
		_, err := n.attach(pod, c, volume)
		require.NoError(t, err)
	}
	require.NoError(t, n.Shutdown(n.ctx(), "a"))
	require.NoError(t, n.Shutdown(n.ctx(), "b"))

	// A device that is mounted on the host is the host's.
	require.NoError(t, n.withVolumes("a", volumeOn(d.node, "")))
	claim, err := os.OpenFile(d.node, os.O_RDONLY|unix.O_EXCL, 0)
	require.NoError(t, err)
	_, err = n.attach("a", "c1", volume)
	require.ErrorContains(t, err, "is in use on the host")
	require.NoError(t, claim.Close())
	_, err = n.attach("a", "c1", volume)
	require.NoError(t, err)
	require.NoError(t, n.Shutdown(n.ctx(), "a"))
	n.requireNothing()
}
