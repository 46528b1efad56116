// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package realvm

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

// Context ends with the test, or after Limit.
func Context(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), Limit)
	t.Cleanup(cancel)
	return ctx
}

// Disks maps serials to the guest's devices.
func (v *VM) Disks() map[string]string {
	v.t.Helper()
	disks := make(map[string]string)
	for path := range strings.FieldsSeq(v.MustRun("ls /sys/block/vd*/serial")) {
		serial, err := v.Run("cat " + path)
		if err == nil {
			disks[serial] = "/dev/" + filepath.Base(filepath.Dir(path))
		}
	}
	return disks
}

// AwaitDisk waits for a disk and returns its device.
func (v *VM) AwaitDisk(serial string) string {
	v.t.Helper()
	for end := time.Now().Add(Limit); ; time.Sleep(5 * time.Millisecond) {
		if dev := v.Disks()[serial]; dev != "" {
			return dev
		}
		if time.Now().After(end) {
			v.t.Fatalf("disk %s does not appear in the guest", serial)
		}
	}
}

// Add is AddDisk of a disk that is hot-plugged.
func (v *VM) Add(disk vmm.Disk) {
	v.t.Helper()
	serial, err := v.AddDisk(Context(v.t), disk)
	require.NoError(v.t, err)
	require.Equal(v.t, disk.Serial, serial)
}

// disks plugs as many disks as a busy pod has images, all from one file, and
// reads them in the guest.
func (s *Suite) disks(t *testing.T) {
	v := s.Boot(t)
	ctx := Context(t)
	before := map[string]string{"root": "/dev/vda", vmm.ScratchSerial: "/dev/vdb"}
	if s.ImageDisk {
		before[vmm.ImageSerial] = "/dev/vdc"
	}
	assert.Equal(t, before, v.Disks())

	img := filepath.Join(t.TempDir(), "image")
	data := make([]byte, 256<<10)
	for i := range data {
		data[i] = byte(i * i >> 8)
	}
	require.NoError(t, os.WriteFile(img, data, 0o600))
	if s.ImageDisk {
		_, err := v.AddDisk(ctx, vmm.Disk{Serial: "first", Path: img, ReadOnly: true})
		require.NoError(t, err)
	}
	want := fmt.Sprintf("%x %d", sha256.Sum256(data), len(data))
	const count = 16
	for i := range count {
		began := time.Now()
		serial := fmt.Sprintf("%019x%d", i, i%10) // 20 characters, as image disks have
		v.Add(vmm.Disk{Serial: serial, Path: img, ReadOnly: true})
		plugged := time.Since(began)
		dev := v.AwaitDisk(serial)
		if i == 0 {
			t.Logf("disk plugged in %v, seen after %v", plugged, time.Since(began))
		}
		assert.Equal(t, want, v.MustRun("sum "+dev))
		_, err := v.Run("put " + dev + " x")
		assert.Error(t, err, "the disk is read-only")
	}
	require.Len(t, v.Disks(), count+len(before))
	began := time.Now()
	for i := range count {
		require.NoError(t, v.RemoveDisk(ctx, fmt.Sprintf("%019x%d", i, i%10)))
	}
	t.Logf("%d disks unplugged in %v", count, time.Since(began))
	assert.Equal(t, before, v.Disks())

	v.Add(vmm.Disk{Serial: "writable", Path: img})
	v.MustRun("put " + v.AwaitDisk("writable") + " written-by-the-guest")
	got, err := os.ReadFile(img)
	require.NoError(t, err)
	assert.Equal(t, "written-by-the-guest", string(got[:20]))
}

// earlyHotplug plugs and unplugs before the guest's kernel knows of hot-plug.
func (s *Suite) earlyHotplug(t *testing.T) {
	v := s.Boot(t)
	ctx := Context(t)
	img := filepath.Join(t.TempDir(), "image")
	require.NoError(t, os.WriteFile(img, make([]byte, 64<<10), 0o600))
	if s.LateHotPlug {
		v.MustRun("cat /proc/version")
	}
	other := img + "2"
	require.NoError(t, os.WriteFile(other, make([]byte, 64<<10), 0o600))
	v.Add(vmm.Disk{Serial: "early", Path: img})
	v.Add(vmm.Disk{Serial: "stays", Path: other})
	require.NoError(t, v.RemoveDisk(ctx, "early"))
	v.AwaitDisk("stays")
	assert.NotContains(t, v.Disks(), "early")
}

// nics plugs a network device and takes it away.
func (s *Suite) nics(t *testing.T) {
	for _, queues := range []int{1, 2} {
		t.Run(fmt.Sprintf("%d queues", queues), func(t *testing.T) {
			v := s.Boot(t)
			ctx := Context(t)
			// A driver uses no more queues than it has processors.
			v.MustRun("cat /proc/version")
			if queues > 1 {
				v.online(ctx, s, queues)
			}
			files := TAP(t, queues)
			mac, err := net.ParseMAC("02:00:00:00:00:2a")
			require.NoError(t, err)
			nic := vmm.NIC{ID: "eth0", MAC: mac, MTU: 1380, Queues: files}
			require.NoError(t, v.AddNIC(ctx, nic))
			assert.Equal(t, "02:00:00:00:00:2a", v.Eventually("cat /sys/class/net/eth0/address", func(s string) bool { return s != "" }))
			assert.Equal(t, "1380", v.MustRun("cat /sys/class/net/eth0/mtu"))
			if queues > 1 {
				// Those for receiving it shows only where packets may take several buffers.
				v.Eventually("ls /sys/class/net/eth0/queues/tx-*", func(got string) bool { return len(strings.Fields(got)) == queues })
			}
			require.NoError(t, v.RemoveNIC(ctx, "eth0"))
			assert.Empty(t, v.MustRun("ls /sys/class/net/eth0"))
			// What failed half-way leaves nothing that stands in the way.
			broken := nic
			broken.Queues = []*os.File{os.Stdin}
			require.Error(t, v.AddNIC(ctx, broken))
			require.NoError(t, v.AddNIC(ctx, nic))
		})
	}
}

// Memory is the guest's, in MiB.
func (v *VM) Memory() int {
	v.t.Helper()
	fields := strings.Fields(v.MustRun("cat /proc/meminfo"))
	kib, err := strconv.Atoi(fields[1])
	require.NoError(v.t, err)
	return kib >> 10
}

// kept is how much of its plugged memory a guest may not give back, in MiB: its
// kernel puts data of its own there, which cannot be moved.
const kept = 32

// memory grows and shrinks. A guest may keep a block with a page in use for a
// while: it is asked again, as the contract says.
func (s *Suite) memory(t *testing.T) {
	v := s.Boot(t)
	ctx := Context(t)
	before := v.Memory()
	for _, mib := range []int{512, 1024, 300, 128, 512} {
		began := time.Now()
		want := before + mib - 128
		for asked := 1; ; asked++ {
			var few *vmm.KeptError
			if err := v.Resize(ctx, vmm.Size{VCPUs: 1, MemoryBytes: int64(mib) << 20}); !errors.As(err, &few) {
				require.NoError(t, err)
			}
			if v.Soon(func() bool { got := v.Memory(); return got > want-4 && got < want+kept }) {
				t.Logf("%d MiB: %+d seen after %v, asked for %d times", mib, v.Memory()-want, time.Since(began), asked)
				break
			}
			require.NoError(t, ctx.Err(), "%d MiB instead of %d", v.Memory(), want)
		}
		if mib > 256 {
			v.MustRun(fmt.Sprintf("touch %d", mib/2))
		}
	}
}

// Soon asks for a second whether something has come about.
func (v *VM) Soon(done func() bool) bool {
	v.t.Helper()
	for end := time.Now().Add(time.Second); ; time.Sleep(5 * time.Millisecond) {
		if ok := done(); ok || time.Now().After(end) {
			return ok
		}
	}
}

// vCPUs brings a second one on line and takes it away again.
func (s *Suite) vCPUs(t *testing.T) {
	v := s.Boot(t)
	ctx := Context(t)
	assert.Equal(t, "0", v.MustRun("cat /sys/devices/system/cpu/online"))
	for range 2 {
		v.online(ctx, s, 2)
		assert.Equal(t, "0-1", v.MustRun("cat /sys/devices/system/cpu/online"))
		v.MustRun("write /sys/devices/system/cpu/cpu1/online 0")
		assert.Equal(t, "0", v.MustRun("cat /sys/devices/system/cpu/online"))
		require.NoError(t, v.Resize(ctx, vmm.Size{VCPUs: 1, MemoryBytes: v.Cfg.Size.MemoryBytes}))
		if s.PlugsVCPUs {
			v.Eventually("cat /sys/devices/system/cpu/present", func(got string) bool { return got == "0" })
		}
	}
}

// online gives the guest so many processors, as the agent would.
func (v *VM) online(ctx context.Context, s *Suite, n int) {
	v.t.Helper()
	require.NoError(v.t, v.Resize(ctx, vmm.Size{VCPUs: n, MemoryBytes: v.Cfg.Size.MemoryBytes}))
	want := fmt.Sprintf("0-%d", n-1)
	if s.PlugsVCPUs {
		v.Eventually("cat /sys/devices/system/cpu/present", func(got string) bool { return got == want })
	} else {
		assert.Equal(v.t, "0-1", v.MustRun("cat /sys/devices/system/cpu/present"))
	}
	for i := 1; i < n; i++ {
		v.Eventually(fmt.Sprintf("write /sys/devices/system/cpu/cpu%d/online 1", i), func(string) bool { return true })
	}
}
