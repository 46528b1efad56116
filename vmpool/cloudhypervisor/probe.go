// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package cloudhypervisor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os/exec"
	"regexp"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// oldest is the first major version that has all that the driver uses.
const oldest = 53

var versionPattern = regexp.MustCompile(`^cloud-hypervisor v?(\d+)(\.\d+)*[^\s]*`)

// Probe finds the binary and its version, and what it could run guests on.
func (d *Driver) Probe(ctx context.Context) (vmm.Host, error) {
	host := vmm.Host{Driver: Name, SnapshotLayout: layout, OverheadBytes: overhead}
	var errs []error
	host.Binary, host.Version, errs = d.findBinary(ctx)
	var err error
	host.Accelerator, host.Reason, err = d.accelerator()
	if err = errors.Join(append(errs, err)...); err != nil {
		return host, fmt.Errorf("cloud-hypervisor: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	d.mu.Lock()
	d.host = host
	d.mu.Unlock()
	return host, nil
}

// findBinary finds the binary and asks it for its version.
func (d *Driver) findBinary(ctx context.Context) (binary, version string, errs []error) {
	binary, err := exec.LookPath(d.binary)
	if err != nil {
		return "", "", []error{err}
	}
	out, err := vmm.Version(ctx, binary, "--version")
	if err != nil {
		return binary, "", []error{err}
	}
	version, err = parseVersion(out)
	if err != nil {
		return binary, version, []error{fmt.Errorf("%s: %w", binary, err)}
	}
	return binary, version, nil
}

// parseVersion reads what --version printed, and refuses what is too old.
func parseVersion(out string) (version string, _ error) {
	line, _, _ := strings.Cut(out, "\n")
	match := versionPattern.FindStringSubmatch(line)
	if match == nil {
		return "", fmt.Errorf("--version says %q, want Cloud Hypervisor's version", line[:min(len(line), 100)])
	}
	version = strings.TrimPrefix(strings.TrimPrefix(match[0], "cloud-hypervisor "), "v")
	if major, _ := strconv.Atoi(match[1]); major < oldest {
		return version, fmt.Errorf("version %s is too old, want %d or later", version, oldest)
	}
	return version, nil
}

// accelerator is what the hypervisor would take: KVM's device where there is one, and
// only else Hyper-V's.
func accelerator(kvm, mshv func() error) (name, reason string, _ error) {
	errKVM := kvm()
	if errKVM == nil {
		return vmm.AccelKVM, "hardware virtualization and /dev/kvm are usable", nil
	}
	errMSHV := mshv()
	switch {
	case errMSHV != nil:
		return "", "", errors.Join(errKVM, errMSHV)
	case !errors.Is(errKVM, fs.ErrNotExist):
		return "", "", fmt.Errorf("it would not look at /dev/mshv beside a /dev/kvm: %w", errKVM)
	}
	return vmm.AccelMSHV, "this is a root partition of Hyper-V's: /dev/mshv is usable, and there is no /dev/kvm", nil
}
