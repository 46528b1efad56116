// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package qemu

import (
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// oldest is the first major version that has all that the driver uses.
const oldest = 7

var versionPattern = regexp.MustCompile(`version (\d+)\.(\d+)(\.\d+)*`)

// Probe finds the binary and its version, and whether KVM is of use.
func (d *Driver) Probe(ctx context.Context) (vmm.Host, error) {
	host := vmm.Host{Driver: Name}
	binary, err := exec.LookPath(d.binary)
	if err != nil {
		return host, fmt.Errorf("qemu: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	host.Binary = binary
	out, err := vmm.Version(ctx, binary, "-version")
	if err != nil {
		return host, fmt.Errorf("qemu: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	line, _, _ := strings.Cut(out, "\n")
	host.Version = strings.TrimPrefix(line, "QEMU emulator version ")
	match := versionPattern.FindStringSubmatch(line)
	if match == nil {
		return host, fmt.Errorf("qemu: %s -version says %q, want a version: %w", binary, line[:min(len(line), 100)], errdefs.ErrFailedPrecondition)
	}
	if major, _ := strconv.Atoi(match[1]); major < oldest {
		return host, fmt.Errorf("qemu: %s has version %s, want %d or later: %w", binary, match[1], oldest, errdefs.ErrFailedPrecondition)
	}
	host.Accelerator, host.Reason = vmm.AccelKVM, "hardware virtualization and /dev/kvm are usable"
	if err := vmm.Opens(vmm.UsableKVM, vmm.AccelKVM, d.Opens)(); err != nil {
		host.Accelerator, host.Reason = vmm.AccelTCG, "software emulation: "+err.Error()
	}
	host.OverheadBytes = overheadOf(host.Accelerator)
	d.mu.Lock()
	d.host = host
	d.mu.Unlock()
	return host, nil
}
