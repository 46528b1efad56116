// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package qemu

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	return ctx
}

// disks maps serials to the guest's devices.
func (v *testVM) disks() map[string]string {
	v.t.Helper()
	disks := make(map[string]string)
	for path := range strings.FieldsSeq(v.mustRun("ls /sys/block/vd*/serial")) {
		serial, err := v.run("cat " + path)
		if err == nil {
			disks[serial] = "/dev/" + filepath.Base(filepath.Dir(path))
		}
	}
	return disks
}

func (v *testVM) awaitDisk(serial string) string {
	v.t.Helper()
	for end := time.Now().Add(limit); ; time.Sleep(5 * time.Millisecond) {
		if dev := v.disks()[serial]; dev != "" {
			return dev
		}
		if time.Now().After(end) {
			v.t.Fatalf("disk %s does not appear in the guest", serial)
		}
	}
}

// TestDisks plugs as many disks as a busy pod has images, all from one file, and
// reads them in the guest.
func TestDisks(t *testing.T) {
	v := boot(t)
	ctx := testContext(t)
	assert.Equal(t, map[string]string{"root": "/dev/vda", vmm.ScratchSerial: "/dev/vdb"}, v.disks())

	img := filepath.Join(t.TempDir(), "image")
	data := make([]byte, 256<<10)
	for i := range data {
		data[i] = byte(i * i >> 8)
	}
	require.NoError(t, os.WriteFile(img, data, 0o600))
	want := fmt.Sprintf("%x %d", sha256.Sum256(data), len(data))
	const count = 16
	for i := range count {
		began := time.Now()
		serial := fmt.Sprintf("%019x%d", i, i%10) // 20 characters, as image disks have
		require.NoError(t, v.AddDisk(ctx, vmm.Disk{Serial: serial, Path: img, ReadOnly: true}))
		plugged := time.Since(began)
		dev := v.awaitDisk(serial)
		if i == 0 {
			t.Logf("disk plugged in %v, seen after %v", plugged, time.Since(began))
		}
		assert.Equal(t, want, v.mustRun("sum "+dev))
		_, err := v.run("put " + dev + " x")
		assert.Error(t, err, "the disk is read-only")
	}
	require.Len(t, v.disks(), count+2)
	began := time.Now()
	for i := range count {
		require.NoError(t, v.RemoveDisk(ctx, fmt.Sprintf("%019x%d", i, i%10)))
	}
	t.Logf("%d disks unplugged in %v", count, time.Since(began))
	assert.Len(t, v.disks(), 2)

	require.NoError(t, v.AddDisk(ctx, vmm.Disk{Serial: "writable", Path: img}))
	v.mustRun("put " + v.awaitDisk("writable") + " written-by-the-guest")
	got, err := os.ReadFile(img)
	require.NoError(t, err)
	assert.Equal(t, "written-by-the-guest", string(got[:20]))
}

// TestEarlyHotplug plugs and unplugs before the guest's kernel knows of hot-plug.
func TestEarlyHotplug(t *testing.T) {
	v := boot(t)
	ctx := testContext(t)
	img := filepath.Join(t.TempDir(), "image")
	require.NoError(t, os.WriteFile(img, make([]byte, 64<<10), 0o600))
	require.NoError(t, v.AddDisk(ctx, vmm.Disk{Serial: "early", Path: img, ReadOnly: true}))
	require.NoError(t, v.AddDisk(ctx, vmm.Disk{Serial: "stays", Path: img, ReadOnly: true}))
	require.NoError(t, v.RemoveDisk(ctx, "early"))
	v.awaitDisk("stays")
	assert.NotContains(t, v.disks(), "early")
}

func TestNIC(t *testing.T) {
	for _, queues := range []int{1, 2} {
		t.Run(fmt.Sprintf("%d queues", queues), func(t *testing.T) {
			v := boot(t)
			ctx := testContext(t)
			// A driver uses no more queues than it has processors.
			for i := 1; i < queues; i++ {
				v.mustRun(fmt.Sprintf("write /sys/devices/system/cpu/cpu%d/online 1", i))
			}
			v.mustRun("cat /proc/version")
			files := tap(t, queues)
			mac, err := net.ParseMAC("02:00:00:00:00:2a")
			require.NoError(t, err)
			nic := vmm.NIC{ID: "eth0", MAC: mac, MTU: 1380, Queues: files}
			require.NoError(t, v.AddNIC(ctx, nic))
			assert.Equal(t, "02:00:00:00:00:2a", v.eventually("cat /sys/class/net/eth0/address", func(s string) bool { return s != "" }))
			assert.Equal(t, "1380", v.mustRun("cat /sys/class/net/eth0/mtu"))
			if queues > 1 {
				assert.Len(t, strings.Fields(v.mustRun("ls /sys/class/net/eth0/queues/rx-*")), queues)
			}
			require.NoError(t, v.RemoveNIC(ctx, "eth0"))
			assert.Empty(t, v.mustRun("ls /sys/class/net/eth0"))
			// What failed half-way leaves nothing that stands in the way.
			broken := nic
			broken.Queues = []*os.File{os.Stdin}
			require.Error(t, v.AddNIC(ctx, broken))
			require.NoError(t, v.AddNIC(ctx, nic))
		})
	}
}

// memory is the guest's, in MiB.
func (v *testVM) memory() int {
	v.t.Helper()
	fields := strings.Fields(v.mustRun("cat /proc/meminfo"))
	kib, err := strconv.Atoi(fields[1])
	require.NoError(v.t, err)
	return kib >> 10
}

// kept is how much of its plugged memory a guest may not give back, in MiB: its
// kernel puts data of its own there, which cannot be moved.
const kept = 32

// TestMemory grows and shrinks. A guest may keep a block with a page in use for a
// while: it is asked again, as the contract says.
func TestMemory(t *testing.T) {
	v := boot(t)
	ctx := testContext(t)
	before := v.memory()
	for _, mib := range []int{512, 1024, 300, 128, 512} {
		began := time.Now()
		want := before + mib - 128
		for asked := 1; ; asked++ {
			var few *vmm.KeptError
			if err := v.Resize(ctx, vmm.Size{VCPUs: 1, MemoryBytes: int64(mib) << 20}); !errors.As(err, &few) {
				require.NoError(t, err)
			}
			if v.soon(func() bool { got := v.memory(); return got > want-4 && got < want+kept }) {
				t.Logf("%d MiB: %+d seen after %v, asked for %d times", mib, v.memory()-want, time.Since(began), asked)
				break
			}
			require.NoError(t, ctx.Err(), "%d MiB instead of %d", v.memory(), want)
		}
		if mib > 256 {
			v.mustRun(fmt.Sprintf("touch %d", mib/2))
		}
	}
}

// soon asks for a second whether something has come about.
func (v *testVM) soon(done func() bool) bool {
	v.t.Helper()
	for end := time.Now().Add(time.Second); ; time.Sleep(5 * time.Millisecond) {
		if ok := done(); ok || time.Now().After(end) {
			return ok
		}
	}
}

func TestVCPUs(t *testing.T) {
	v := boot(t)
	assert.Equal(t, "0", v.mustRun("cat /sys/devices/system/cpu/online"))
	assert.Equal(t, "0-1", v.mustRun("cat /sys/devices/system/cpu/present"))
	v.mustRun("write /sys/devices/system/cpu/cpu1/online 1")
	assert.Equal(t, "0-1", v.mustRun("cat /sys/devices/system/cpu/online"))
	v.mustRun("write /sys/devices/system/cpu/cpu1/online 0")
	assert.Equal(t, "0", v.mustRun("cat /sys/devices/system/cpu/online"))
}
