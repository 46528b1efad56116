// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package cloudhypervisor

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// testUser is nobody's.
const testUser = 1879048192 + 4200

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("VMMs are confined by root")
	}
}

func ownerAndMode(t *testing.T, path string) (uint32, os.FileMode) {
	t.Helper()
	info, err := os.Lstat(path)
	require.NoError(t, err)
	return info.Sys().(*syscall.Stat_t).Uid, info.Mode().Perm()
}

// A snapshot's files become root's; a link in their place leads nowhere.
func TestSeal(t *testing.T) {
	needRoot(t)
	dir, outside := t.TempDir(), filepath.Join(t.TempDir(), "outside")
	for _, path := range []string{outside, filepath.Join(dir, memoryName)} {
		require.NoError(t, os.WriteFile(path, nil, 0o600))
		require.NoError(t, os.Chown(path, testUser, testUser))
	}
	require.NoError(t, seal(dir))
	uid, mode := ownerAndMode(t, filepath.Join(dir, memoryName))
	assert.Zero(t, uid)
	assert.Equal(t, os.FileMode(0o444), mode)

	require.NoError(t, os.Symlink(outside, filepath.Join(dir, stateName)))
	require.Error(t, seal(dir))
	uid, mode = ownerAndMode(t, outside)
	assert.Equal(t, uint32(testUser), uid)
	assert.Equal(t, os.FileMode(0o600), mode)

	require.NoError(t, os.Remove(filepath.Join(dir, stateName)))
	require.NoError(t, os.Link(outside, filepath.Join(dir, stateName)))
	require.ErrorIs(t, seal(dir), errdefs.ErrPermissionDenied, "it is a file of elsewhere too")
	uid, _ = ownerAndMode(t, outside)
	assert.Equal(t, uint32(testUser), uid)
}

// What a hypervisor has made is read with care, and what it has open it changes in vain.
func TestConfigOfAStranger(t *testing.T) {
	path := filepath.Join(t.TempDir(), configName)
	for name, place := range map[string]func() error{
		"a FIFO":      func() error { return unix.Mkfifo(path, 0o600) },
		"a link":      func() error { return os.Symlink("/dev/zero", path) },
		"a directory": func() error { return os.Mkdir(path, 0o700) },
		"without end": func() error { return errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, 1<<40)) },
	} {
		require.NoError(t, place(), name)
		require.Error(t, editConfig(path), name)
		require.NoError(t, os.Remove(path), name)
	}
	const config = `{"memory":{"thp":false,"zones":[{"id":"ram","shared":true}]},"payload":{"kernel":"/x/kernel"}}`
	require.NoError(t, os.WriteFile(path, []byte(config), 0o400))
	kept, err := os.OpenFile(path, os.O_RDWR, 0)
	require.NoError(t, err)
	defer kept.Close() //nolint:errcheck // a test's
	require.NoError(t, editConfig(path))
	_, mode := ownerAndMode(t, path)
	assert.Equal(t, os.FileMode(0o400), mode)
	text, err := os.ReadFile(path)
	require.NoError(t, err)
	_, err = kept.WriteAt([]byte("hostile"), 0)
	require.NoError(t, err)
	after, err := os.ReadFile(path)
	require.NoError(t, err)
	assert.Equal(t, string(text), string(after))
}

// Its working directory is closed to the hypervisor, if its sockets are what they seem.
func TestCloseOwn(t *testing.T) {
	needRoot(t)
	dir, err := os.MkdirTemp("", "vm") // a test's own is too long for sockets
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	own := filepath.Join(dir, ownDir)
	require.NoError(t, os.Mkdir(own, 0o700))
	require.NoError(t, os.Chown(own, testUser, testUser))
	vm, err := newVM("a", dir, "", testUser, data{})
	require.NoError(t, err)
	for _, name := range []string{consoleSocket, guestSocket, "other"} {
		l, err := net.Listen("unix", filepath.Join(own, name))
		require.NoError(t, err)
		defer l.Close() //nolint:errcheck // a listener nobody dials
	}
	require.NoError(t, vm.closeOwn())
	uid, mode := ownerAndMode(t, own)
	assert.Zero(t, uid)
	assert.Equal(t, os.FileMode(0o710), mode)

	require.NoError(t, os.Remove(filepath.Join(own, guestSocket)))
	require.NoError(t, os.Symlink("other", filepath.Join(own, guestSocket)))
	require.ErrorIs(t, vm.closeOwn(), errdefs.ErrPermissionDenied)
}

// A disk that is plugged has a second name, of which no other file is reached.
func TestLend(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	vm, err := newVM("a", dir, "", testUser, data{Disks: filepath.Join(dir, "scratch.d")})
	require.NoError(t, err)
	require.NoError(t, os.Mkdir(vm.own.Disks, 0o700))
	for serial, readOnly := range map[string]bool{"image": true, "volume": false} {
		path := filepath.Join(dir, serial)
		require.NoError(t, os.WriteFile(path, nil, 0o600))
		for range 2 { // what an earlier call left is replaced
			lent, err := vm.lend(vmm.Disk{Serial: serial, Path: path, ReadOnly: readOnly})
			require.NoError(t, err)
			assert.Equal(t, filepath.Join(vm.own.Disks, serial), lent)
			uid, mode := ownerAndMode(t, lent)
			if readOnly {
				assert.Zero(t, uid)
				assert.Equal(t, os.FileMode(0o644), mode)
			} else {
				assert.Equal(t, uint32(testUser), uid)
				assert.Equal(t, os.FileMode(0o600), mode)
			}
		}
		require.NoError(t, vm.takeBack(serial))
		require.NoError(t, vm.takeBack(serial))
		assert.NoFileExists(t, filepath.Join(vm.own.Disks, serial))
		uid, _ := ownerAndMode(t, path)
		assert.Zero(t, uid)
	}
}

// A directory that the VMM's user may not go through is named before it starts, and so is
// the file that it would not have found.
func TestUnreachableFile(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	closed := filepath.Join(dir, "closed")
	require.NoError(t, os.Mkdir(closed, 0o700))
	template := filepath.Join(closed, "template")
	require.NoError(t, os.Mkdir(template, 0o711))
	for up := dir; up != "/"; up = filepath.Dir(up) {
		info, err := os.Stat(up)
		require.NoError(t, err)
		require.NoError(t, os.Chmod(up, info.Mode().Perm()|0o011)) // go test makes it for its own user
	}
	memory := filepath.Join(template, memoryName)
	require.NoError(t, os.WriteFile(memory, nil, 0o600))
	cfg := vmm.Config{ID: "a", Dir: dir, UID: testUser, MemoryFile: memory}
	require.NoError(t, os.Mkdir(filepath.Join(dir, ownDir), 0o700))
	_, err := command(vmm.Host{Binary: "/bin/true"}, cfg, nil)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.ErrorContains(t, err, "cannot reach "+template+": others may not enter "+closed+", whose mode is 0700")
	require.NoError(t, os.Chmod(closed, 0o711)) //nolint:gosec // so that it can be entered
	_, err = command(vmm.Host{Binary: "/bin/true"}, cfg, nil)
	require.NoError(t, err)
}
