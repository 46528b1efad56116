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

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmmtest"
)

// blockDevice is a block device of a test's, on a sparse file.
type blockDevice struct {
	t          *testing.T
	node, file string
	// link leads to the node, as kubelet's do.
	link string
}

func newBlockDevice(t *testing.T, size int64, blockSize uint32, readOnly bool) *blockDevice {
	t.Helper()
	d := &blockDevice{t: t, link: filepath.Join(t.TempDir(), "link")}
	d.node, d.file = vmmtest.LoopDevice(t, size, blockSize, readOnly)
	require.NoError(t, os.Symlink(d.node, d.link))
	return d
}

// as is the device in a container.
func (d *blockDevice) as(path, permissions string) *runtimeapi.Device {
	return &runtimeapi.Device{HostPath: d.link, ContainerPath: path, Permissions: permissions}
}

// text is what the device has on the disk, at an offset.
func (d *blockDevice) text(at int64, n int) string {
	d.t.Helper()
	f, err := os.Open(d.file)
	require.NoError(d.t, err)
	defer f.Close()
	buf := make([]byte, n)
	_, err = f.ReadAt(buf, at)
	require.NoError(d.t, err)
	return string(buf)
}

// users are the processes that have the device open, but for this one.
func (d *blockDevice) users() []string {
	d.t.Helper()
	var device unix.Stat_t
	require.NoError(d.t, unix.Stat(d.node, &device))
	links, err := filepath.Glob("/proc/[0-9]*/fd/*")
	require.NoError(d.t, err)
	var users []string
	for _, link := range links {
		var st unix.Stat_t
		if strings.HasPrefix(link, fmt.Sprintf("/proc/%d/", os.Getpid())) || unix.Stat(link, &st) != nil {
			continue
		}
		if st.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev == device.Rdev {
			users = append(users, link)
		}
	}
	return users
}

// requireUnused waits until nobody has the device open.
func (d *blockDevice) requireUnused() {
	d.t.Helper()
	require.NoError(d.t, testnode.Eventually(testContext(d.t), func(context.Context) error {
		if users := d.users(); len(users) > 0 {
			return fmt.Errorf("%s is in use: %q", d.node, users)
		}
		return nil
	}))
}

// nodeState is what a device's node is on the host: nobody is to change it.
func (d *blockDevice) nodeState() string {
	d.t.Helper()
	var st unix.Stat_t
	require.NoError(d.t, unix.Stat(d.node, &st))
	return fmt.Sprintf("%o %d:%d %d", st.Mode, st.Uid, st.Gid, st.Rdev)
}

func withDevices(cfg *runtimeapi.ContainerConfig, devices ...*runtimeapi.Device) *runtimeapi.ContainerConfig {
	cfg.Devices = devices
	return cfg
}

// put writes a text at a block of 512 bytes, and syncs.
func (c *container) put(device, text string, at int) {
	c.t.Helper()
	c.sh(fmt.Sprintf("printf %%s '%s' | dd of=%s bs=512 seek=%d conv=notrunc,fsync 2>/dev/null", text, device, at))
}

// at is what a device has at a block.
func (c *container) at(device string, at, n int) string {
	c.t.Helper()
	return c.sh(fmt.Sprintf("dd if=%s bs=512 skip=%d count=1 2>/dev/null | head -c %d", device, at, n))
}

// removed stops and removes a container.
func (c *container) removed() {
	c.t.Helper()
	require.NoError(c.t, c.n.StopContainer(testContext(c.t), c.id, 0))
	require.NoError(c.t, c.n.RemoveContainer(testContext(c.t), c.id))
}

// TestBlockDevices checks raw block volumes: what a container sees of the device, what
// reaches the host, and that a device is given back.
func TestBlockDevices(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		d, large := newBlockDevice(t, 16<<20, 512, false), newBlockDevice(t, 8<<20, 4096, false)
		fixed := newBlockDevice(t, 1<<20, 512, true)
		before := d.nodeState()
		p := newPod(t, h)
		c := p.start(withDevices(idleConfig("c"), d.as("/dev/xvda", "rwm"), large.as("/data/large", "rwm"), fixed.as("/dev/fixed", "rwm")))
		require.Equal(t, "block special file 600 0 0\n", c.sh("stat -c '%F %a %u %g' /dev/xvda"))
		require.Equal(t, fmt.Sprintf("%d\n512\n%d\n4096\n%d\n1\n", 16<<20, 8<<20, 1<<20),
			c.sh("blockdev --getsize64 /dev/xvda; blockdev --getss /dev/xvda; blockdev --getsize64 /data/large; blockdev --getss /data/large; blockdev --getsize64 /dev/fixed; blockdev --getro /dev/fixed"))

		c.put("/dev/xvda", "written inside", 7)
		require.Equal(t, "written inside", d.text(7*512, 14), "it is on the host after fsync")
		c.put("/data/large", "large", 8)
		require.Equal(t, "large", large.text(8*512, 5))
		require.Contains(t, c.sh("dd if=/dev/zero of=/dev/fixed count=1 2>&1 || true"), "dd: ", "it cannot be written to")
		require.Equal(t, "refused\n", c.sh("mknod /tmp/other b 254 0 && head -c 1 /tmp/other 2>/dev/null || echo refused"), "another disk")

		// Another container has the same device, and may only read.
		reader := p.start(withDevices(idleConfig("reader"), d.as("/dev/theirs", "r")))
		require.Equal(t, "written inside", reader.at("/dev/theirs", 7, 14))
		require.Contains(t, reader.sh("dd if=/dev/zero of=/dev/theirs count=1 conv=notrunc 2>&1 || true"), "not permitted")
		sharer := p.start(withDevices(idleConfig("sharer"), d.as("/dev/shared", "rwm")))
		sharer.put("/dev/shared", "shared", 9)
		require.Equal(t, "shared", c.at("/dev/xvda", 9, 6), "what another container of the pod has written")

		// It goes with its last container, and comes again.
		c.removed()
		sharer.put("/dev/shared", "still", 10)
		require.Equal(t, "still", d.text(10*512, 5))
		large.requireUnused()
		fixed.requireUnused()
		reader.removed()
		sharer.removed()
		d.requireUnused()
		again := p.start(withDevices(idleConfig("again"), d.as("/dev/xvdb", "rwm")))
		require.Equal(t, "written inside", again.at("/dev/xvdb", 7, 14))
		again.put("/dev/xvdb", "last words", 11)
		require.NoError(t, p.n.StopPod(testContext(t), p.id))
		require.Equal(t, "last words", d.text(11*512, 10))
		d.requireUnused()
		assert.Equal(t, before, d.nodeState())
	})
}

// TestBlockDeviceRestart checks that a device stays through a restart of the container, of
// containerd, and the end of a process.
func TestBlockDeviceRestart(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		d := newBlockDevice(t, 1<<20, 512, false)
		p := newPod(t, h)
		c := p.start(withDevices(idleConfig("c"), d.as("/dev/xvda", "rwm")))
		c.put("/dev/xvda", "one", 1)
		require.NoError(t, p.n.Kill(testContext(t)))
		require.NoError(t, p.n.Start(testContext(t)))
		c.put("/dev/xvda", "two", 2)
		other := p.start(withDevices(idleConfig("other"), d.as("/dev/xvda", "rwm")))
		require.Equal(t, "one", other.at("/dev/xvda", 1, 3))
		require.Equal(t, "two", other.at("/dev/xvda", 2, 3))
		other.removed()
		c.removed()
		d.requireUnused()
		// One that ends by itself gives it back too.
		p.start(withDevices(shellConfig("ends", "printf three | dd of=/dev/xvda bs=512 seek=3 conv=notrunc,fsync; exit 3"), d.as("/dev/xvda", "rwm"))).awaitExit()
		require.Equal(t, "three", d.text(3*512, 5))
		d.requireUnused()
		next := p.start(withDevices(idleConfig("next"), d.as("/dev/xvda", "rwm")))
		require.Equal(t, "two", next.at("/dev/xvda", 2, 3))
		require.Equal(t, "twoone", d.text(2*512, 3)+d.text(512, 3))
	})
}

// TestBlockDeviceOfPods checks that two pods may have the same device, as two that are in
// the same one's network may: who has it has to know how to share it.
func TestBlockDeviceOfPods(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		d := newBlockDevice(t, 1<<20, 512, false)
		a := newPod(t, h).start(withDevices(idleConfig("a"), d.as("/dev/xvda", "rwm")))
		a.put("/dev/xvda", "from a", 1)
		b := newPod(t, h).start(withDevices(idleConfig("b"), d.as("/dev/xvda", "rwm")))
		require.Equal(t, "from a", b.at("/dev/xvda", 1, 6))
		b.put("/dev/xvda", "from b", 2)
		require.Equal(t, "from b", a.at("/dev/xvda", 2, 6))
	})
}

// TestBlockDeviceReadOnly checks that a device which a container may only read is opened for
// no more by its hypervisor: root of the VM, whom no cgroup keeps, cannot write to it.
func TestBlockDeviceReadOnly(t *testing.T) {
	requireCloudHV(t)
	d := newBlockDevice(t, 1<<20, 512, false)
	p := newPod(t, testnode.CloudHV, func(cfg *runtimeapi.PodSandboxConfig) { cfg.Linux.SecurityContext.Privileged = true })
	cfg := withDevices(idleConfig("c"), d.as("/dev/xvda", "r"))
	cfg.Linux.SecurityContext.Privileged = true
	c := p.start(cfg)
	require.Equal(t, "1\n", c.sh("blockdev --getro /dev/xvda"))
	c.sh("blockdev --setrw /dev/xvda || true")
	require.Contains(t, c.sh("printf x | dd of=/dev/xvda conv=notrunc,fsync 2>&1 || echo refused"), "refused")
	require.Equal(t, "\x00", d.text(0, 1))
	users := d.users()
	require.NotEmpty(t, users)
	for _, link := range users {
		info, err := os.ReadFile(strings.Replace(link, "/fd/", "/fdinfo/", 1))
		require.NoError(t, err)
		var flags int
		_, after, _ := strings.Cut(string(info), "flags:")
		_, err = fmt.Sscanf(after, "%o", &flags)
		require.NoError(t, err)
		require.Equal(t, os.O_RDONLY, flags&unix.O_ACCMODE, link)
	}
}
