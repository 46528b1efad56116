// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmm

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// What runs a guest's processors: values of Host.Accelerator.
const (
	AccelKVM  = "kvm"
	AccelMSHV = "mshv"
	// AccelTCG is QEMU's software emulation.
	AccelTCG = "tcg"
)

// Device is what a VMM opens to run a guest by an accelerator; empty if there is none.
func Device(accelerator string) string {
	switch accelerator {
	case AccelKVM:
		return theHost.kvm
	case AccelMSHV:
		return theHost.mshv
	default:
		return ""
	}
}

// ioctls of /dev/kvm and of a VM's file.
const (
	kvmGetAPIVersion = 0xae00
	kvmCreateVM      = 0xae01
	kvmCreateVCPU    = 0xae41
	kvmAPIVersion    = 12
)

// hostFiles are where a host shows what it can; tests have others.
type hostFiles struct {
	cpuinfo, kvm, mshv string
	// ioctl is unix.IoctlRetInt, of a device that has these ioctls.
	ioctl func(fd int, request uint) (int, error)
}

var theHost = hostFiles{cpuinfo: "/proc/cpuinfo", kvm: "/dev/kvm", mshv: "/dev/mshv", ioctl: unix.IoctlRetInt}

// UsableKVM tells why KVM cannot run a stock guest kernel, or nil. A /dev/kvm that
// opens is no proof: a paravirtual one opens and makes VMs too, on a processor without
// virtualization.
func UsableKVM() error { return theHost.usableKVM() }

// UsableMSHV tells why there is no Hyper-V root partition that runs guests for us, or
// nil.
func UsableMSHV() error { return theHost.usableMSHV() }

// Opens adds a check to one of an accelerator: whether a VMM may open its device. Without
// it, which is nil, a VMM may open what we can.
func Opens(usable func() error, accelerator string, opens func(device string) error) func() error {
	return func() error {
		if err := usable(); err != nil || opens == nil {
			return err
		}
		return opens(Device(accelerator))
	}
}

func (h hostFiles) usableKVM() error {
	f, err := openDevice(h.kvm)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // nothing is buffered
	virt, err := hasVirtualization(h.cpuinfo)
	if err != nil {
		return err
	}
	if !virt {
		return fmt.Errorf("the processor shows neither vmx nor svm, so %s is paravirtual and runs no stock kernel", h.kvm)
	}
	version, err := h.ioctl(int(f.Fd()), kvmGetAPIVersion)
	if err != nil {
		return fmt.Errorf("%s does not tell its version: %w", h.kvm, err)
	}
	if version != kvmAPIVersion {
		return fmt.Errorf("%s has API version %d, want %d", h.kvm, version, kvmAPIVersion)
	}
	return h.tryVM(f)
}

// tryVM makes a VM with one processor and lets it go again.
func (h hostFiles) tryVM(kvm *os.File) error {
	vm, err := h.ioctl(int(kvm.Fd()), kvmCreateVM)
	if err != nil {
		return fmt.Errorf("%s makes no VM: %w", kvm.Name(), err)
	}
	defer unix.Close(vm) //nolint:errcheck // nothing is buffered
	vcpu, err := h.ioctl(vm, kvmCreateVCPU)
	if err != nil {
		return fmt.Errorf("%s makes no processor: %w", kvm.Name(), err)
	}
	return unix.Close(vcpu)
}

func (h hostFiles) usableMSHV() error {
	f, err := openDevice(h.mshv)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // nothing is buffered
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Mode()&os.ModeCharDevice == 0 {
		return fmt.Errorf("%s is no device", h.mshv)
	}
	return nil
}

// openDevice opens a device of the host's, and says in the user's words why not.
func openDevice(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("there is no %s: %w", path, err)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("no permission for %s: %w", path, err)
	}
	return f, err
}

func hasVirtualization(cpuinfo string) (bool, error) {
	f, err := os.Open(cpuinfo)
	if err != nil {
		return false, err
	}
	defer f.Close() //nolint:errcheck // read only
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		key, value, _ := strings.Cut(lines.Text(), ":")
		if strings.TrimSpace(key) != "flags" {
			continue
		}
		flags := strings.Fields(value)
		return slices.Contains(flags, "vmx") || slices.Contains(flags, "svm"), nil
	}
	return false, lines.Err()
}
