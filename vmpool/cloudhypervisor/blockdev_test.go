// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package cloudhypervisor

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/vmpool/confine/attack"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmmtest"
)

// machineWithDisks is a machine of a user's, with a directory for disks that he can enter.
func machineWithDisks(t *testing.T) *machine {
	t.Helper()
	dir, err := os.MkdirTemp("", "vm")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	require.NoError(t, os.Chmod(dir, 0o711)) //nolint:gosec // another user goes through it
	vm, err := newVM("a", dir, "", testUser, data{Disks: filepath.Join(dir, "scratch.d")})
	require.NoError(t, err)
	require.NoError(t, os.Mkdir(vm.own.Disks, 0o711))
	return vm
}

// as runs a command as the hypervisor's user, and says whether it succeeds.
func as(t *testing.T, name string, args ...string) bool {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: testUser, Gid: testUser}}
	out, err := cmd.CombinedOutput()
	t.Logf("%s %q: %v %s", name, args, err, out)
	return err == nil
}

// A block device is lent by a node of its own, by which the hypervisor's user alone can
// open it, for reading only if that is all. The host's node stays as it is.
func TestLendDevice(t *testing.T) {
	needRoot(t)
	vm := machineWithDisks(t)
	device, _ := vmmtest.LoopDevice(t, 1<<20, 512, false)
	var host unix.Stat_t
	require.NoError(t, unix.Stat(device, &host))
	for serial, readOnly := range map[string]bool{"dev-1": false, "dev-1-r": true} {
		for range 2 { // what an earlier call left is replaced
			lent, err := vm.lend(vmm.Disk{Serial: serial, Path: device, ReadOnly: readOnly})
			require.NoError(t, err)
			require.Equal(t, filepath.Join(vm.own.Disks, serial), lent)
			var st unix.Stat_t
			require.NoError(t, unix.Stat(lent, &st))
			assert.Equal(t, host.Rdev, st.Rdev)
			assert.EqualValues(t, unix.S_IFBLK, st.Mode&unix.S_IFMT)
			assert.Equal(t, uint32(testUser), st.Uid)
			assert.True(t, as(t, "dd", "if="+lent, "of=/dev/null", "count=1"))
			assert.Equal(t, !readOnly, as(t, "dd", "if=/dev/zero", "of="+lent, "count=1", "conv=notrunc,nocreat"))
		}
		require.NoError(t, vm.takeBack(serial))
		require.NoError(t, vm.takeBack(serial))
		assert.NoFileExists(t, filepath.Join(vm.own.Disks, serial))
	}
	var after unix.Stat_t
	require.NoError(t, unix.Stat(device, &after))
	assert.Equal(t, [3]uint32{host.Mode, host.Uid, host.Gid}, [3]uint32{after.Mode, after.Uid, after.Gid})
	assert.False(t, as(t, "dd", "if="+device, "of=/dev/null", "count=1"))
}

// Where a node is of no use, that is said before the hypervisor fails by it.
func TestLendDeviceNodev(t *testing.T) {
	needRoot(t)
	vm := machineWithDisks(t)
	device, _ := vmmtest.LoopDevice(t, 1<<20, 512, false)
	require.NoError(t, unix.Mount("nodev", vm.own.Disks, "tmpfs", unix.MS_NODEV, ""))
	defer func() { require.NoError(t, unix.Unmount(vm.own.Disks, 0)) }()
	_, err := vm.lend(vmm.Disk{Serial: "dev-1", Path: device})
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.ErrorContains(t, err, "nodev")
	assert.NoFileExists(t, filepath.Join(vm.own.Disks, "dev-1"))
}

// Targets of the attacks on block devices.
const (
	targetDevice, targetReadDevice  = "device", "device to read"
	targetHostDevice, targetGone    = "the host's device", "device taken back"
	targetOtherDevice, targetOthers = "another VM's device", "disks of another VM"
)

// blockAttacks and blockNeeds are on block devices that are plugged.
var (
	blockAttacks = []attack.Attack{
		{Name: "write a block device that is only to read", Do: attack.Open(attack.File(targetReadDevice), unix.O_RDWR)},
		{Name: "open the host's node of a block device", Do: attack.Open(attack.File(targetHostDevice), unix.O_RDONLY)},
		{Name: "open another VM's block device", Do: attack.Open(attack.File(targetOtherDevice), unix.O_RDONLY)},
		{Name: "list another VM's block devices", Do: attack.Open(attack.File(targetOthers), unix.O_RDONLY|unix.O_DIRECTORY)},
		{Name: "open a block device that was taken back", Do: attack.Open(attack.File(targetGone), unix.O_RDONLY)},
		{Name: "make a node of a block device", Do: func(t *attack.Targets) error {
			path := filepath.Join(filepath.Dir(t.Files[targetDevice]), "made")
			err := unix.Mknod(path, unix.S_IFBLK|0o600, int(unix.Mkdev(7, 0)))
			if err != nil {
				return err
			}
			return os.Remove(path)
		}},
	}
	blockNeeds = []attack.Attack{
		{Name: "write a block device", Do: func(t *attack.Targets) error { return useDisk(t.Files[targetDevice]) }},
		{Name: "learn a block device's size", Do: func(t *attack.Targets) error {
			fd, err := unix.Open(t.Files[targetReadDevice], unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return err
			}
			_, err = unix.IoctlGetInt(fd, unix.BLKSSZGET)
			return errors.Join(err, unix.Close(fd))
		}},
	}
)

// TestTakenOverBlockDevices has a VMM use the block devices that are plugged, and try what
// it must not: others, and to write where it is to read. The host's node is open to nobody.
func TestTakenOverBlockDevices(t *testing.T) {
	n := newNode(t)
	first, _ := vmmtest.LoopDevice(t, 1<<20, 512, false)
	second, _ := vmmtest.LoopDevice(t, 1<<20, 512, false)
	neighbour := n.boot(t, attackUID+1, "", false)
	_, err := neighbour.AddDisk(attack.Context(t), vmm.Disk{Serial: "dev", Path: second})
	require.NoError(t, err)
	for _, uid := range []uint32{attackUID, 0} {
		v := n.boot(t, uid, "", false)
		what := v.Lure(t, neighbour)
		for serial, readOnly := range map[string]bool{"dev": false, "dev-r": true, "dev-gone": false} {
			_, err := v.AddDisk(attack.Context(t), vmm.Disk{Serial: serial, Path: first, ReadOnly: readOnly})
			require.NoError(t, err)
		}
		require.NoError(t, v.RemoveDisk(attack.Context(t), "dev-gone"))
		own, others := vmm.DisksDir(v.Config.Scratch), vmm.DisksDir(neighbour.Config.Scratch)
		what.Files = map[string]string{
			targetDevice: filepath.Join(own, "dev"), targetReadDevice: filepath.Join(own, "dev-r"), targetGone: filepath.Join(own, "dev-gone"),
			targetHostDevice: first, targetOtherDevice: filepath.Join(others, "dev"), targetOthers: others,
		}
		if uid == 0 {
			// Nothing is lent to it: it opens the host's.
			what.Files[targetDevice], what.Files[targetReadDevice], what.Files[targetGone] = first, first, first
			results := v.Try(t, what)
			attack.Done(t, results, blockAttacks[:len(blockAttacks)-1]...) // and no node among the host's
			attack.Done(t, results, blockNeeds...)
			continue
		}
		results := v.Try(t, what)
		attack.Refused(t, results, blockAttacks...)
		attack.Done(t, results, blockNeeds...)
	}
}
