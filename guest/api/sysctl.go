// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package api

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

const maxSysctlName = 256

// A pod may set what runc would let it set: the kernel's parameters that belong
// to its network and IPC namespaces. Others could reach beyond a container:
// kernel.core_pattern, for one, starts programs outside of all of them.
var (
	podSysctls        = []string{"kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced", "kernel.domainname"}
	podSysctlPrefixes = []string{"net.", "fs.mqueue."}
)

// SysctlPath returns the path below /proc/sys of a dotted name. As with sysctl(8),
// a name that has a slash before any dot is a path already, in which dots stand
// for themselves: net/ipv4/conf/eth0.1/forwarding. One that a pod may not set is an
// errdefs.ErrInvalidArgument.
func SysctlPath(name string) (string, error) {
	bad := func(why string) (string, error) {
		return "", fmt.Errorf("sysctl %q: %s: %w", name[:min(len(name), 128)], why, errdefs.ErrInvalidArgument)
	}
	if name == "" || len(name) > maxSysctlName {
		return bad(fmt.Sprintf("want 1 to %d bytes", maxSysctlName))
	}
	parts := strings.Split(name, ".")
	if i := strings.IndexAny(name, "./"); i >= 0 && name[i] == '/' {
		parts = strings.Split(name, "/")
	}
	for _, p := range parts {
		if !validSysctlPart(p) {
			return bad("want a dotted name of [A-Za-z0-9_-]")
		}
	}
	dotted := strings.Join(parts, ".")
	if !slices.Contains(podSysctls, dotted) && !slices.ContainsFunc(podSysctlPrefixes, func(p string) bool { return strings.HasPrefix(dotted, p) }) {
		return bad("want one of the network or IPC namespace, as a pod may set no other")
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
