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
	"strings"

	"github.com/containerd/errdefs"
)

const (
	sysctlDir       = "/proc/sys"
	maxSysctlName   = 256
	maxSysctlValue  = 4 << 10
	sysctlSeparator = "."
)

// A pod may set what runc would let it set: the kernel's parameters that belong
// to its network and IPC namespaces. Others could reach beyond a container:
// kernel.core_pattern, for one, starts programs outside of all of them.
var (
	podSysctls        = []string{"kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced", "kernel.domainname"}
	podSysctlPrefixes = []string{"net.", "fs.mqueue."}
)

// sysctlPath returns the path below /proc/sys of a dotted name. As with sysctl(8),
// a name that has a slash before any dot is a path already, in which dots stand
// for themselves: net/ipv4/conf/eth0.1/forwarding.
func sysctlPath(name string) (string, error) {
	bad := func(why string) (string, error) {
		return "", fmt.Errorf("sysctl %q: %s: %w", clip(name), why, errdefs.ErrInvalidArgument)
	}
	if name == "" || len(name) > maxSysctlName {
		return bad(fmt.Sprintf("want 1 to %d bytes", maxSysctlName))
	}
	parts := strings.Split(name, sysctlSeparator)
	if i := strings.IndexAny(name, "./"); i >= 0 && name[i] == '/' {
		parts = strings.Split(name, "/")
	}
	for _, p := range parts {
		if !validSysctlPart(p) {
			return bad("want a dotted name of [A-Za-z0-9_-]")
		}
	}
	dotted := strings.Join(parts, sysctlSeparator)
	if !slices.Contains(podSysctls, dotted) && !slices.ContainsFunc(podSysctlPrefixes, func(p string) bool { return strings.HasPrefix(dotted, p) }) {
		return bad("not one that a pod may set")
	}
	return filepath.Join(parts...), nil
}

func validSysctlPart(p string) bool {
	if p == "" || p == "." || p == ".." {
		return false
	}
	for _, c := range []byte(p) {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '_' && c != '-' && c != '.' {
			return false
		}
	}
	return true
}

// setSysctls writes them in the order of names.
func setSysctls(dir string, all map[string]string) error {
	names := make([]string, 0, len(all))
	for n := range all {
		names = append(names, n)
	}
	slices.Sort(names)
	for _, n := range names {
		path, err := sysctlPath(n)
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
