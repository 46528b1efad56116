// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"encoding/json"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// directVolume is one as a pod's annotation has it.
type directVolume struct {
	Volume  string   `json:"volume"`
	Device  string   `json:"device"`
	FSType  string   `json:"fstype"`
	Options []string `json:"options,omitempty"`
}

func withDirectVolumes(t *testing.T, volumes ...directVolume) func(*runtimeapi.PodSandboxConfig) {
	t.Helper()
	text, err := json.Marshal(volumes)
	require.NoError(t, err)
	return func(cfg *runtimeapi.PodSandboxConfig) {
		if cfg.Annotations == nil {
			cfg.Annotations = map[string]string{}
		}
		cfg.Annotations["io.cloudhv.direct_volumes"] = string(text)
	}
}

// run runs a program of the host's that must succeed.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	require.NoError(t, err, "%s %q: %s", name, args, out)
	return string(out)
}

// newFS makes a file system with a file "made" on a device or in a file.
func newFS(t *testing.T, fsType, on string) {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, os.Chmod(dir, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "made"), []byte("by mkfs\n"), 0o644))
	require.NoError(t, os.Mkdir(filepath.Join(dir, "sub"), 0o777))
	switch fsType {
	case "ext4":
		run(t, "mkfs.ext4", "-q", "-F", "-d", dir, on)
	case "erofs":
		run(t, "mkfs.erofs", on, dir)
	}
}

// newImage makes a sparse file with a file system.
func newImage(t *testing.T, dir, name, fsType string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	require.NoError(t, os.WriteFile(path, nil, 0o600))
	if fsType == "ext4" {
		require.NoError(t, os.Truncate(path, 32<<20))
	}
	newFS(t, fsType, path)
	return path
}

// requireClean checks that a file system is complete on the host: it was unmounted, and
// nothing in it is amiss.
func requireClean(t *testing.T, on string) {
	t.Helper()
	require.Regexp(t, `Filesystem state: +clean\n`, run(t, "dumpe2fs", "-h", on))
	require.NotContains(t, run(t, "dumpe2fs", "-h", on), "needs_recovery")
	run(t, "e2fsck", "-f", "-n", on)
}

// onHost is what a file system has in a file.
func onHost(t *testing.T, on, file string) string {
	t.Helper()
	out, err := exec.Command("debugfs", "-R", "cat "+file, on).Output()
	require.NoError(t, err)
	return string(out)
}

// nodeWithVolumes is a node of the test's own that allows direct volumes in some places.
func nodeWithVolumes(t *testing.T, places ...string) *testnode.Node {
	t.Helper()
	n := ownNode(t, map[string]any{"direct_volumes": places})
	img, err := testimage.Helper(suite.helper)
	require.NoError(t, err)
	require.NoError(t, n.Import(testContext(t), testimage.HelperRef, img))
	return n
}

// TestDirectVolumes gives pods file systems of block devices and of images, which only
// their VMs mount.
func TestDirectVolumes(t *testing.T) {
	dir, err := filepath.EvalSymlinks(openDir(t))
	require.NoError(t, err)
	d := newBlockDevice(t, 32<<20, 512, false)
	newFS(t, "ext4", d.node)
	image, fixed := newImage(t, dir, "image", "ext4"), newImage(t, dir, "fixed", "erofs")
	n := nodeWithVolumes(t, dir, d.node)
	host := openDir(t)
	kubelet := func(cfg *runtimeapi.PodSandboxConfig) string {
		return filepath.Join(host, "pods", cfg.GetMetadata().GetUid(), "volumes/kubernetes.io~empty-dir/cache")
	}
	volumes := withDirectVolumes(t,
		directVolume{host + "/data", image, "ext4", []string{"noatime"}}, directVolume{"cache", d.link, "ext4", nil},
		directVolume{host + "/fixed", fixed, "erofs", nil})
	p := podBy(t, n, testnode.CloudHV, volumes)
	require.Empty(t, d.users(), "nobody has asked for it yet")
	c := p.start(withMounts(idleConfig("c"),
		&runtimeapi.Mount{ContainerPath: "/data", HostPath: host + "/data"},
		&runtimeapi.Mount{ContainerPath: "/sub", HostPath: host + "/data/sub", Readonly: true},
		&runtimeapi.Mount{ContainerPath: "/file", HostPath: host + "/data/made"},
		&runtimeapi.Mount{ContainerPath: "/cache", HostPath: kubelet(p.cfg)},
		&runtimeapi.Mount{ContainerPath: "/fixed", HostPath: host + "/fixed"},
		&runtimeapi.Mount{ContainerPath: "/served", HostPath: host}))
	require.Equal(t, "ext4\next4\next4\nerofs\n9p\n",
		c.sh(`for m in /data /sub /cache /fixed /served; do awk -v m=$m '$2 == m { print $3 }' /proc/mounts; done`))
	require.Equal(t, "by mkfs\nby mkfs\nby mkfs\nby mkfs\n", c.sh("cat /data/made /file /cache/made /fixed/made"))
	c.sh("echo to the image > /data/sub/new && mkfifo /data/fifo && chown 7:8 /data/sub/new && sync -f /data/sub/new || sync")
	require.Equal(t, "to the image\n7:8\n", c.sh("cat /sub/new; stat -c %u:%g /sub/new"))
	for _, script := range []string{"echo x > /sub/x", "echo x > /fixed/x", "rm /sub/new"} {
		require.Contains(t, c.sh("("+script+") 2>&1 || true"), "Read-only file system", script)
	}
	require.Contains(t, c.sh("(mknod /data/null c 1 3 && echo x > /data/null) 2>&1 || true"), "ermission denied", "it has no devices")

	other := p.start(withMounts(idleConfig("other"), &runtimeapi.Mount{ContainerPath: "/again", HostPath: host + "/data"}))
	other.sh("echo by another > /again/other && ln -s /etc /again/link && rm /again/null")
	require.Equal(t, "by another\n", c.sh("cat /data/other"))
	id, err := n.CreateContainer(testContext(t), p.id, p.cfg,
		withMounts(idleConfig("none"), &runtimeapi.Mount{ContainerPath: "/none", HostPath: host + "/data/none"}))
	if err == nil {
		err = n.StartContainer(testContext(t), id)
	}
	require.ErrorContains(t, err, "/none")
	// CRI makes directories for mounts that are not there.
	require.NoError(t, filepath.WalkDir(host, func(path string, e fs.DirEntry, err error) error {
		require.NoError(t, err)
		require.True(t, e.IsDir(), "%s came to the host", path)
		return nil
	}))

	// The last container's end brings all of it to the host, whole; the next finds it.
	c.removed()
	d.requireUnused()
	requireClean(t, d.node)
	other.sh("echo still here > /again/last")
	other.removed()
	requireClean(t, image)
	require.Equal(t, "by another\n", onHost(t, image, "/other"))
	require.Equal(t, "still here\n", onHost(t, image, "/last"))
	require.Equal(t, "to the image\n", onHost(t, image, "/sub/new"))

	// Containerd may come and go, and the pod end while containers run.
	c = p.start(withMounts(idleConfig("next"), &runtimeapi.Mount{ContainerPath: "/data", HostPath: host + "/data"},
		&runtimeapi.Mount{ContainerPath: "/cache", HostPath: kubelet(p.cfg)}))
	require.NoError(t, n.Kill(testContext(t)))
	require.NoError(t, n.Start(testContext(t)))
	require.Equal(t, "still here\n", c.sh("cat /data/last; echo unsynced > /data/unsynced; echo cached > /cache/cached"))
	require.NoError(t, n.StopPod(testContext(t), p.id))
	d.requireUnused()
	requireClean(t, image)
	requireClean(t, d.node)
	require.Equal(t, "unsynced\n", onHost(t, image, "/unsynced"))
	require.Equal(t, "cached\n", onHost(t, d.node, "/cached"))
}

// TestDirectVolumesRefused checks who cannot have a direct volume.
func TestDirectVolumesRefused(t *testing.T) {
	dir, err := filepath.EvalSymlinks(openDir(t))
	require.NoError(t, err)
	d := newBlockDevice(t, 32<<20, 512, false)
	newFS(t, "ext4", d.node)
	image := newImage(t, dir, "image", "ext4")
	outside := newImage(t, t.TempDir(), "outside", "ext4")
	require.NoError(t, os.Symlink(outside, filepath.Join(dir, "link")))

	volumes := withDirectVolumes(t, directVolume{"/mnt/data", image, "ext4", nil})
	cfg := podConfig(t, volumes)
	_, err = node(t).RunPod(testContext(t), cfg, testnode.CloudHV)
	require.ErrorContains(t, err, "io.cloudhv.direct_volumes")
	require.ErrorContains(t, err, "this node's configuration allows no direct volumes (direct_volumes)")
	require.NoError(t, node(t).RemoveAllPods(testContext(t)))

	n := nodeWithVolumes(t, dir, "/dev/loop*")
	for name, tc := range map[string]struct {
		volume directVolume
		want   string
	}{
		"elsewhere":    {directVolume{"/mnt/data", outside, "ext4", nil}, "it is " + outside + ", where this node's configuration allows none"},
		"a link":       {directVolume{"/mnt/data", dir + "/link", "ext4", nil}, "it is " + outside + ", where"},
		"nothing":      {directVolume{"/mnt/data", dir + "/none", "ext4", nil}, "no such file"},
		"another type": {directVolume{"/mnt/data", image, "ntfs", nil}, `[0].fstype = "ntfs": must be one of ext4, xfs, erofs`},
	} {
		cfg := n.PodConfig("refused")
		withDirectVolumes(t, tc.volume)(cfg)
		_, err := n.RunPod(testContext(t), cfg, testnode.CloudHV)
		require.ErrorContains(t, err, tc.want, name)
	}
	create := func(p *pod, name string) error {
		t.Helper()
		id, err := n.CreateContainer(testContext(t), p.id, p.cfg,
			withMounts(idleConfig(name), &runtimeapi.Mount{ContainerPath: "/v", HostPath: "/mnt/data"}))
		if err == nil {
			err = n.StartContainer(testContext(t), id)
		}
		return err
	}
	p := podBy(t, n, testnode.CloudHV, volumes)
	require.NoError(t, create(p, "first"))
	second := podBy(t, n, testnode.CloudHV, volumes)
	require.ErrorContains(t, create(second, "second"), "has it, and one of the two writes")
	require.NoError(t, n.StopPod(testContext(t), p.id))
	require.NoError(t, create(second, "second again"))

	// A wrong type is seen by who mounts it.
	wrong := podBy(t, n, testnode.CloudHV, withDirectVolumes(t, directVolume{"/mnt/data", d.node, "xfs", nil}))
	require.ErrorContains(t, create(wrong, "wrong"), "mount disk volume-1 as xfs")
	d.requireUnused()
	mounted := openDir(t)
	require.NoError(t, unix.Mount(d.node, mounted, "ext4", 0, ""))
	hosts := podBy(t, n, testnode.CloudHV, withDirectVolumes(t, directVolume{"/mnt/data", d.node, "ext4", nil}))
	require.ErrorContains(t, create(hosts, "hosts"), "is in use on the host")
	require.NoError(t, unix.Unmount(mounted, 0))
	require.NoError(t, create(hosts, "free"))
}

// TestDirectVolumeUserns checks that files of a direct volume belong in a user namespace to
// whom they belong on the disk.
func TestDirectVolumeUserns(t *testing.T) {
	dir, err := filepath.EvalSymlinks(openDir(t))
	require.NoError(t, err)
	image := newImage(t, dir, "image", "ext4")
	n := nodeWithVolumes(t, dir)
	p := podBy(t, n, testnode.CloudHV, withDirectVolumes(t, directVolume{"/mnt/data", image, "ext4", nil}),
		namespaceOptions(func(o *runtimeapi.NamespaceOption) { o.UsernsOptions = podUsers() }))
	c := p.start(inUserns(withMounts(idleConfig("c"), &runtimeapi.Mount{ContainerPath: "/data", HostPath: "/mnt/data"})))
	require.Equal(t, "0:0\n0:0\n", c.sh("stat -c %u:%g /data/made; echo x > /data/new; stat -c %u:%g /data/new"))
	c.sh("chown 5:6 /data/new")
	c.removed()
	requireClean(t, image)
	require.Regexp(t, `User: +5 +Group: +6 `, run(t, "debugfs", "-R", "stat /new", image))
	require.Equal(t, "x\n", onHost(t, image, "/new"))
}
