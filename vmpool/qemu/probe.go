// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package qemu

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

const (
	accelKVM = "kvm"
	accelTCG = "tcg"
	// oldest is the first major version that has all that the driver uses.
	oldest = 7

	kvmGetAPIVersion = 0xae00
	kvmAPIVersion    = 12
)

var versionPattern = regexp.MustCompile(`version (\d+)\.(\d+)(\.\d+)*`)

// Probe finds the binary and its version, and whether KVM is of use.
func (d *Driver) Probe(ctx context.Context) (vmm.Host, error) {
	host := vmm.Host{Driver: Name}
	binary, err := exec.LookPath(d.binary)
	if err != nil {
		return host, fmt.Errorf("qemu: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	host.Binary = binary
	out, err := exec.CommandContext(ctx, binary, "-version").Output()
	if err != nil {
		return host, fmt.Errorf("qemu: %s -version: %w: %w", binary, err, errdefs.ErrFailedPrecondition)
	}
	line, _, _ := strings.Cut(string(out), "\n")
	host.Version = strings.TrimPrefix(line, "QEMU emulator version ")
	match := versionPattern.FindStringSubmatch(line)
	if match == nil {
		return host, fmt.Errorf("qemu: %s -version says %q, want a version: %w", binary, line, errdefs.ErrFailedPrecondition)
	}
	if major, _ := strconv.Atoi(match[1]); major < oldest {
		return host, fmt.Errorf("qemu: %s has version %s, want %d or later: %w", binary, match[1], oldest, errdefs.ErrFailedPrecondition)
	}
	host.Accelerator, host.Reason = accelKVM, "hardware virtualization and /dev/kvm are usable"
	if err := usableKVM(); err != nil {
		host.Accelerator, host.Reason = accelTCG, "software emulation: "+err.Error()
	}
	d.mu.Lock()
	d.host = host
	d.mu.Unlock()
	return host, nil
}

// usableKVM tells why KVM cannot run a stock guest kernel. A /dev/kvm that opens
// is no proof: a paravirtual one opens too, on a processor without virtualization.
func usableKVM() error {
	virt, err := hasVirtualization("/proc/cpuinfo")
	if err != nil {
		return err
	}
	if !virt {
		return errors.New("the processor shows neither vmx nor svm")
	}
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // nothing is buffered
	version, err := unix.IoctlRetInt(int(f.Fd()), kvmGetAPIVersion)
	if err != nil {
		return fmt.Errorf("/dev/kvm does not tell its version: %w", err)
	}
	if version != kvmAPIVersion {
		return fmt.Errorf("/dev/kvm has API version %d, want %d", version, kvmAPIVersion)
	}
	return nil
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
