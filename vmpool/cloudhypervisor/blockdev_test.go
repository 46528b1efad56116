// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package cloudhypervisor

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

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
