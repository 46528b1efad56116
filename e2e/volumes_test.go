// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// withMounts is a container's configuration with mounts of the host.
func withMounts(cfg *runtimeapi.ContainerConfig, mounts ...*runtimeapi.Mount) *runtimeapi.ContainerConfig {
	cfg.Mounts = mounts
	return cfg
}

// openDir is a directory of the host's that everybody gets to.
func openDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp/chv", "volume")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	require.NoError(t, os.Chmod(dir, 0o755))
	return dir
}

// tmpfs mounts a file system of its own on a directory.
func tmpfs(t *testing.T, size string) string {
	t.Helper()
	dir := openDir(t)
	require.NoError(t, unix.Mount("volume", dir, "tmpfs", 0, "mode=755,size="+size))
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			require.ErrorIs(t, err, unix.EINVAL)
		}
	})
	return dir
}

// TestVolumes checks directories and files of the host, for reading and for writing.
func TestVolumes(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		dir := openDir(t)
		require.NoError(t, os.WriteFile(filepath.Join(dir, "a"), []byte("of the host\n"), 0o640))
		require.NoError(t, os.Chown(filepath.Join(dir, "a"), 12, 34))
		file := filepath.Join(t.TempDir(), "file with spaces")
		require.NoError(t, os.WriteFile(file, nil, 0o666))
		link := filepath.Join(t.TempDir(), "link")
		require.NoError(t, os.Symlink(dir, link))

		p := newPod(t, h)
		c := p.start(withMounts(idleConfig("a"),
			&runtimeapi.Mount{ContainerPath: "/rw", HostPath: dir},
			&runtimeapi.Mount{ContainerPath: "/ro", HostPath: dir, Readonly: true},
			&runtimeapi.Mount{ContainerPath: "/deep/er/file", HostPath: file},
			&runtimeapi.Mount{ContainerPath: "/link", HostPath: link}))
		other := p.start(withMounts(idleConfig("b"), &runtimeapi.Mount{ContainerPath: "/other", HostPath: dir}))

		require.Equal(t, "of the host\n", c.sh("cat /rw/a /dev/null"))
		require.Equal(t, "640 12 34\n", c.sh("stat -c '%a %u %g' /ro/a"))
		c.sh("echo of the guest > /rw/b && chown 5:6 /rw/b && chmod 600 /rw/b && echo written > /deep/er/file")
		require.Equal(t, "of the guest\n", other.sh("cat /other/b"))
		require.Equal(t, "of the guest\n", c.sh("cat /link/b"))
		st, err := os.Stat(filepath.Join(dir, "b"))
		require.NoError(t, err)
		require.EqualValues(t, 0o600, st.Mode().Perm())
		got, err := os.ReadFile(file)
		require.NoError(t, err)
		require.Equal(t, "written\n", string(got))
		for _, script := range []string{"echo x > /ro/b", "echo x > /ro/new", "rm /ro/a", "mkdir /ro/d", "chmod 777 /ro/a"} {
			require.Contains(t, c.sh("("+script+") 2>&1 || true"), "Read-only file system", script)
		}
		require.NoError(t, os.WriteFile(filepath.Join(dir, "later"), []byte("later\n"), 0o644))
		require.Equal(t, "later\n", c.sh("cat /rw/later"))
	})
}

// TestVolumeFiles has a program in a container look at what a file system does, in a
// volume, and at what it costs.
func TestVolumeFiles(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		dir := openDir(t)
		c := newPod(t, h).start(withMounts(idleConfig("c"), &runtimeapi.Mount{ContainerPath: "/v", HostPath: dir}))
		t.Logf("\n%s", c.exec(testimage.HelperPath, "filebench", "/v", "4", "20"))
		out, errOut, code, err := c.n.ExecSync(testContext(t), c.id, testimage.HelperPath, "files", "/v")
		require.NoError(t, err)
		require.Equal(t, "checked\n", out, errOut)
		require.Zero(t, code)
		t.Logf("\n%s", errOut)
	})
}

// TestVolumeSwap checks that what kubelet does to a ConfigMap's volume is seen at once: it
// exchanges a symbolic link, by a rename, for one to another directory.
func TestVolumeSwap(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		dir := openDir(t)
		write := func(value string) {
			require.NoError(t, os.Mkdir(filepath.Join(dir, "..", filepath.Base(dir), "..v"+value), 0o755))
			require.NoError(t, os.WriteFile(filepath.Join(dir, "..v"+value, "key"), []byte(value), 0o644))
			require.NoError(t, os.Symlink("..v"+value, filepath.Join(dir, "..data_tmp")))
			require.NoError(t, os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
		}
		write("1")
		require.NoError(t, os.Symlink("..data/key", filepath.Join(dir, "key")))
		c := newPod(t, h).start(withMounts(shellConfig("c", "trap 'exit 0' TERM; last=; while :; do v=$(cat /v/key); [ \"$v\" = \"$last\" ] || echo $v; last=$v; sleep 0.1; done"),
			&runtimeapi.Mount{ContainerPath: "/v", HostPath: dir, Readonly: true}))
		c.awaitLine("1")
		for _, v := range []string{"2", "3"} {
			write(v)
			require.Equal(t, v, c.sh("cat /v/key"), "whoever looks after the exchange")
			require.NoError(t, os.RemoveAll(filepath.Join(dir, "..v"+map[string]string{"2": "1", "3": "2"}[v])))
			c.awaitLine(v)
		}
	})
}

// TestVolumeErrors checks that a full disk, and one that is mounted read-only, are errors
// inside.
func TestVolumeErrors(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		dir := tmpfs(t, "1m")
		c := newPod(t, h).start(withMounts(idleConfig("c"), &runtimeapi.Mount{ContainerPath: "/v", HostPath: dir}))
		require.Contains(t, c.sh("dd if=/dev/zero of=/v/x bs=64k count=100 2>&1 || true"), "No space left on device")
		c.sh("rm /v/x && echo small > /v/x")
		require.Equal(t, "1024\n", c.sh("df -k /v | awk 'END { print $2 }'"))
	})
}

// TestHugePages checks that limits of no huge pages, as kubelet has them for every
// container, cost nothing, and that the host's huge pages are no volume.
func TestHugePages(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		huge := openDir(t)
		require.NoError(t, unix.Mount("huge", huge, "hugetlbfs", 0, ""))
		t.Cleanup(func() { require.NoError(t, unix.Unmount(huge, 0)) })
		p := newPod(t, h)
		cfg := idleConfig("none")
		cfg.Linux.Resources.HugepageLimits = []*runtimeapi.HugepageLimit{{PageSize: "2MB"}, {PageSize: "1GB"}}
		p.start(cfg).exec("true")
		id, err := p.n.CreateContainer(testContext(t), p.id, p.cfg, withMounts(idleConfig("c"), &runtimeapi.Mount{ContainerPath: "/huge", HostPath: huge}))
		if err == nil {
			err = p.n.StartContainer(testContext(t), id)
		}
		if h == testnode.RunC {
			require.NoError(t, err)
			return
		}
		require.ErrorContains(t, err, "it is of huge pages (medium: HugePages)")
		require.ErrorContains(t, err, "/huge")
		require.ErrorContains(t, err, huge)
	})
}

// TestVolumeEnd checks that a container's end, or the pod's, lets go of what it mounted,
// also while files in it are open.
func TestVolumeEnd(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		ofContainer, ofPod := tmpfs(t, "1m"), tmpfs(t, "1m")
		slave := tmpfs(t, "1m")
		require.NoError(t, unix.Mount("", slave, "", unix.MS_SHARED, ""))
		require.NoError(t, os.WriteFile(filepath.Join(ofContainer, "file"), nil, 0o644))
		p := newPod(t, h)
		p.start(withMounts(shellConfig("stays", "trap 'exit 0' TERM; exec 5>/p/open; while :; do sleep 0.1; done"),
			&runtimeapi.Mount{ContainerPath: "/p", HostPath: ofPod},
			&runtimeapi.Mount{ContainerPath: "/s", HostPath: slave, Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER}))
		c := p.start(withMounts(shellConfig("goes", "trap 'exit 0' TERM; cd /c; exec 5>/c/open; while :; do sleep 0.1; done"),
			&runtimeapi.Mount{ContainerPath: "/c", HostPath: ofContainer},
			&runtimeapi.Mount{ContainerPath: "/file", HostPath: filepath.Join(ofContainer, "file")}))
		require.NoError(t, p.n.StopContainer(testContext(t), c.id, 0))
		require.NoError(t, p.n.RemoveContainer(testContext(t), c.id))
		requireFree(t, ofContainer)
		require.NoError(t, p.n.StopPod(testContext(t), p.id))
		requireFree(t, ofPod)
		requireFree(t, slave)
	})
}

// requireFree unmounts a file system, which must not be in use by anything: it can then be
// mounted read-only before, which a file open for writing anywhere would not let it be.
func requireFree(t *testing.T, dir string) {
	t.Helper()
	require.NoError(t, testnode.Eventually(testContext(t), func(context.Context) error {
		return unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
	}), "the file system is in use")
	require.NoError(t, unix.Unmount(dir, 0))
}

// TestVolumesRestart checks that volumes do not care for containerd.
func TestVolumesRestart(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		dir := openDir(t)
		p := newPod(t, h)
		c := p.start(withMounts(shellConfig("c", "trap 'exit 0' TERM; i=0; while :; do i=$((i+1)); echo $i > /v/next; mv /v/next /v/count; sleep 0.1; done"),
			&runtimeapi.Mount{ContainerPath: "/v", HostPath: dir}))
		count := func() string {
			b, _ := os.ReadFile(filepath.Join(dir, "count"))
			return strings.TrimSpace(string(b))
		}
		goesOn := func() {
			from := count()
			require.NoError(t, testnode.Eventually(testContext(t), func(context.Context) error {
				if now := count(); now == from || now == "" {
					return fmt.Errorf("the count is %q still", now)
				}
				return nil
			}))
		}
		goesOn()
		require.NoError(t, p.n.Stop(testContext(t)))
		goesOn()
		require.NoError(t, p.n.Start(testContext(t)))
		goesOn()
		// A container that is made now has the same volume.
		require.NotEmpty(t, c.sh("cat /v/count"))
		d := p.start(withMounts(idleConfig("d"), &runtimeapi.Mount{ContainerPath: "/w", HostPath: dir}))
		require.NotEmpty(t, d.sh("cat /w/count"))
	})
}

// TestVolumeGroup checks what fsGroup builds on: somebody without rights of his own writes
// by a supplemental group, and what he makes is his and the directory's group's.
func TestVolumeGroup(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		dir := openDir(t)
		require.NoError(t, os.Chown(dir, 0, 2000))
		require.NoError(t, os.Chmod(dir, 0o2775|os.ModeSetgid))
		cfg := withMounts(idleConfig("c"), &runtimeapi.Mount{ContainerPath: "/v", HostPath: dir})
		cfg.Linux.SecurityContext.RunAsUser = &runtimeapi.Int64Value{Value: 1000}
		cfg.Linux.SecurityContext.SupplementalGroups = []int64{2000}
		c := newPod(t, h).start(cfg)
		require.Equal(t, "1000 2000 644\n", c.sh("umask 022; echo x > /v/f && echo more >> /v/f && stat -c '%u %g %a' /v/f"))
		require.Equal(t, "1000 2000 2755\n", c.sh("umask 022; mkdir /v/d && stat -c '%u %g %a' /v/d"))
		require.Contains(t, c.sh("(chown 0 /v/f) 2>&1 || true"), "not permitted")
		var st unix.Stat_t
		require.NoError(t, unix.Stat(filepath.Join(dir, "f"), &st))
		require.Equal(t, "1000:2000", fmt.Sprintf("%d:%d", st.Uid, st.Gid))
	})
}

// TestImageVolume checks that a volume of the image's has what the image has there, and
// that each container has its own.
func TestImageVolume(t *testing.T) {
	// A node of its own, as an image leaves something in the caches.
	n := poolNode(t, map[string]any{"min": 0, "max": 0})
	img, err := testimage.Volume(suite.helper)
	require.NoError(t, err)
	require.NoError(t, n.Import(testContext(t), testimage.VolumeRef, img))
	forHandlers(t, func(t *testing.T, h string) {
		p := podBy(t, n, h)
		for _, name := range []string{"a", "b"} {
			c := p.start(testnode.ContainerConfig(name, testimage.VolumeRef, testimage.HelperPath, "term", "0"))
			require.Equal(t, "by the image\n", c.sh("cat /data/*"))
			c.sh("echo written > /data/new && rm /data/prepared")
			require.Equal(t, "written\n", c.sh("cat /data/*"))
		}
	})
}

// TestMountedImage mounts an image as a volume: all of it, and a directory of it, in two
// containers of a pod. containerd mounts it on the host.
func TestMountedImage(t *testing.T) {
	n := poolNode(t, map[string]any{"min": 0, "max": 0})
	img, err := testimage.Volume(suite.helper)
	require.NoError(t, err)
	require.NoError(t, n.Import(testContext(t), testimage.VolumeRef, img))
	spec := &runtimeapi.ImageSpec{Image: testimage.VolumeRef}
	forHandlers(t, func(t *testing.T, h string) {
		p := podBy(t, n, h)
		for _, name := range []string{"a", "b"} {
			c := p.start(withMounts(testnode.ContainerConfig(name, testimage.VolumeRef, testimage.HelperPath, "term", "0"),
				&runtimeapi.Mount{ContainerPath: "/image", Image: spec, Readonly: true},
				&runtimeapi.Mount{ContainerPath: "/part", Image: spec, ImageSubPath: "data", Readonly: true}))
			require.Equal(t, "by the image\n", c.sh("cat /image/data/prepared"))
			require.Equal(t, "prepared\n", c.sh("ls /part"))
			require.Contains(t, c.sh("touch /image/new /part/new 2>&1 || true"), "Read-only file system")
			require.Equal(t, "same\n", c.sh("cmp "+testimage.HelperPath+" /image"+testimage.HelperPath+" && echo same"))
		}
		_, err := n.CreateContainer(testContext(t), p.id, p.cfg, withMounts(testnode.ContainerConfig("c", testimage.VolumeRef, testimage.HelperPath, "term", "0"),
			&runtimeapi.Mount{ContainerPath: "/part", Image: spec, ImageSubPath: "missing", Readonly: true}))
		require.ErrorContains(t, err, "missing")
	})
}

// TestVolumesManyFiles walks through a large tree. What the guest held of it is let go.
func TestVolumesManyFiles(t *testing.T) {
	requireCloudHV(t)
	dir := openDir(t)
	const dirs, each = 10, 100
	for d := range dirs {
		sub := filepath.Join(dir, fmt.Sprint(d))
		require.NoError(t, os.Mkdir(sub, 0o755))
		for f := range each {
			require.NoError(t, os.WriteFile(filepath.Join(sub, fmt.Sprint(f)), nil, 0o644))
		}
	}
	c := newPod(t, testnode.CloudHV).start(withMounts(idleConfig("c"), &runtimeapi.Mount{ContainerPath: "/v", HostPath: dir}))
	began := time.Now()
	require.Equal(t, fmt.Sprintln(dirs*each), c.sh("ls -lR /v | grep -c '^-'"))
	t.Logf("%d files were listed in %s", dirs*each, time.Since(began))
	require.NoError(t, testnode.Eventually(testContext(t), func(context.Context) error {
		if n := shimFiles(t, c.pod); n > 100 {
			return fmt.Errorf("the shim has %d files open", n)
		}
		return nil
	}))
}

// shimFiles counts the open files of a pod's shim.
func shimFiles(t *testing.T, p *pod) int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.info().ShimPid))
	require.NoError(t, err)
	return len(entries)
}
