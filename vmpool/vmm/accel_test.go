// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmm

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestVirtualization(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]bool{
		"processor\t: 0\nflags\t\t: fpu svm npt\n":    true,
		"flags\t\t: fpu vmx ept\n":                    true,
		"flags\t\t: fpu hypervisor svm_lock vmxnet\n": false,
		"model name\t: svm vmx\nflags\t\t: fpu\n":     false,
		"": false,
	} {
		got, err := hasVirtualization(write(t, text))
		require.NoError(t, err)
		assert.Equal(t, want, got, "%q", text)
	}
}

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

// Each way in which KVM is of no use has a reason of its own.
func TestUnusableKVM(t *testing.T) {
	t.Parallel()
	real, none := write(t, "flags: fpu svm\n"), write(t, "flags: fpu\n")
	for name, tc := range map[string]struct {
		host hostFiles
		want string
		is   error
	}{
		"no device":       {hostFiles{cpuinfo: real, kvm: "/nonexistent/kvm"}, "there is no /nonexistent/kvm", fs.ErrNotExist},
		"another device":  {hostFiles{cpuinfo: real, kvm: os.DevNull}, "/dev/null does not tell its version", unix.ENOTTY},
		"no cpuinfo":      {hostFiles{cpuinfo: "/nonexistent/cpuinfo", kvm: os.DevNull}, "/nonexistent/cpuinfo", fs.ErrNotExist},
		"a paravirtual":   {hostFiles{cpuinfo: none, kvm: os.DevNull}, "neither vmx nor svm", nil},
		"not even a file": {hostFiles{cpuinfo: real, kvm: t.TempDir()}, "is a directory", unix.EISDIR},
		"another version": {hostFiles{cpuinfo: real, kvm: os.DevNull, ioctl: fakeKVM(11, nil)}, "/dev/null has API version 11, want 12", nil},
		"makes no VM":     {hostFiles{cpuinfo: real, kvm: os.DevNull, ioctl: fakeKVM(12, map[uint]error{kvmCreateVM: unix.EOPNOTSUPP})}, "/dev/null makes no VM", unix.EOPNOTSUPP},
		"makes no vCPU":   {hostFiles{cpuinfo: real, kvm: os.DevNull, ioctl: fakeKVM(12, map[uint]error{kvmCreateVCPU: unix.EIO})}, "/dev/null makes no processor", unix.EIO},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if tc.host.ioctl == nil {
				tc.host.ioctl = unix.IoctlRetInt
			}
			err := tc.host.usableKVM()
			require.ErrorContains(t, err, tc.want)
			if tc.is != nil {
				require.ErrorIs(t, err, tc.is)
			}
		})
	}
}

// fakeKVM is a /dev/kvm of a version that fails as said.
func fakeKVM(version int, fails map[uint]error) func(int, uint) (int, error) {
	return func(_ int, request uint) (int, error) {
		if request == kvmGetAPIVersion {
			return version, nil
		}
		if err := fails[request]; err != nil {
			return 0, err
		}
		return unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0) // whoever asks closes it
	}
}

// A KVM that does all that is usable.
func TestUsableKVM(t *testing.T) {
	t.Parallel()
	require.NoError(t, hostFiles{cpuinfo: write(t, "flags: vmx\n"), kvm: os.DevNull, ioctl: fakeKVM(12, nil)}.usableKVM())
}

// The host's own /dev/kvm is judged without an accident, whatever it is.
func TestThisHost(t *testing.T) {
	t.Parallel()
	virt, err := hasVirtualization("/proc/cpuinfo")
	require.NoError(t, err)
	kvm := UsableKVM()
	t.Logf("KVM: %v; MSHV: %v", kvm, UsableMSHV())
	if !virt {
		require.Error(t, kvm)
	}
}

func TestUnusableMSHV(t *testing.T) {
	t.Parallel()
	require.ErrorIs(t, hostFiles{mshv: "/nonexistent/mshv"}.usableMSHV(), fs.ErrNotExist)
	require.ErrorContains(t, hostFiles{mshv: write(t, "")}.usableMSHV(), "is no device")
	require.NoError(t, hostFiles{mshv: os.DevNull}.usableMSHV())
}

// A device that others may open and we may not: another user runs the test.
func TestForbiddenDevices(t *testing.T) {
	if path := os.Getenv("FORBIDDEN_DEVICE"); path != "" {
		for _, err := range []error{hostFiles{cpuinfo: "/proc/cpuinfo", kvm: path, ioctl: unix.IoctlRetInt}.usableKVM(), hostFiles{mshv: path}.usableMSHV()} {
			require.ErrorIs(t, err, fs.ErrPermission)
			require.ErrorContains(t, err, "no permission for "+path)
		}
		return
	}
	if os.Getuid() != 0 {
		t.Skip("only root can be another user")
	}
	dir, err := os.MkdirTemp("", "device")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o755))
	device, program := filepath.Join(dir, "kvm"), filepath.Join(dir, "test")
	require.NoError(t, os.WriteFile(device, nil, 0o600))
	require.NoError(t, exec.Command("cp", os.Args[0], program).Run())
	cmd := exec.Command(program, "-test.run=^TestForbiddenDevices$")
	cmd.Dir, cmd.Env = "/", append(os.Environ(), "FORBIDDEN_DEVICE="+device)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
}
