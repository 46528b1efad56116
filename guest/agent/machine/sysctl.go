// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package machine

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/podns"
	"github.com/cloudhv/containerd-cloudhv/guest/api"
)

const (
	sysctlDir      = "/proc/sys"
	maxSysctlValue = 4 << 10
)

// setSysctls writes them in the pod's namespaces n.
func setSysctls(dir string, all map[string]string, n *podns.Namespaces) error {
	if n == nil {
		return writeSysctls(dir, all)
	}
	ours, theirs := map[string]string{}, map[string]string{}
	for name, value := range all {
		path, err := api.SysctlPath(name)
		switch {
		case err != nil:
			return err
		case path == "net/ipv4/ping_group_range":
			if ours[name], err = mapGroups(value, n); err != nil {
				return fmt.Errorf("sysctl %q: value %q: %w", name, clip(value), err)
			}
		case strings.HasPrefix(path, "net/"), path == "kernel/domainname":
			ours[name] = value
		default:
			// The kernel lets nobody but the namespace's root write those of the IPC namespace.
			theirs[name] = value
		}
	}
	return errors.Join(
		n.Do(func() error { return writeSysctls(dir, ours) }),
		n.DoAsRoot(func() error { return writeSysctls(dir, theirs) }),
	)
}

// mapGroups makes groups of the pod's user namespace those of the VM, to which the kernel
// takes what is written here.
func mapGroups(value string, n *podns.Namespaces) (string, error) {
	fields := strings.Fields(value)
	for i, f := range fields {
		id, err := strconv.ParseUint(f, 10, 32)
		group, ok := n.Group(uint32(id))
		if err != nil || !ok {
			return "", fmt.Errorf("%q is no group of the pod's user namespace: %w", f, errdefs.ErrInvalidArgument)
		}
		fields[i] = strconv.FormatUint(uint64(group), 10)
	}
	return strings.Join(fields, " "), nil
}

// writeSysctls writes them in the order of names.
func writeSysctls(dir string, all map[string]string) error {
	names := make([]string, 0, len(all))
	for n := range all {
		names = append(names, n)
	}
	slices.Sort(names)
	for _, n := range names {
		path, err := api.SysctlPath(n)
		if err != nil {
			return err
		}
		if len(all[n]) > maxSysctlValue {
			return fmt.Errorf("sysctl %q: value of %d bytes: want at most %d: %w", n, len(all[n]), maxSysctlValue, errdefs.ErrInvalidArgument)
		}
		f, err := os.OpenFile(filepath.Join(dir, path), os.O_WRONLY, 0)
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("sysctl %q: the guest's kernel does not have it: %w", n, errdefs.ErrInvalidArgument)
		}
		if err != nil {
			return fmt.Errorf("sysctl %q: %w", n, err)
		}
		_, err = f.WriteString(all[n])
		if err = errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("sysctl %q: value %q: %w: %w", n, clip(all[n]), errdefs.ErrInvalidArgument, err)
		}
	}
	return nil
}
