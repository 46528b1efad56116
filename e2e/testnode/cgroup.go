// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testnode

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// CgroupOf is the cgroup that a process is in as far as a controller goes, below the root of
// its hierarchy: the controller's own in version 1, or else that of version 2. It returns
// ErrNotFound if there is neither.
func CgroupOf(pid int, controller string) (group, root string, _ error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return "", "", err
	}
	for line := range strings.Lines(string(text)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		switch {
		case len(parts) != 3:
		case slices.Contains(strings.Split(parts[1], ","), controller):
			return parts[2], filepath.Join(cgroupRoot, controller), nil
		case parts[1] == "":
			group, root = parts[2], cgroupRoot
		}
	}
	if root == "" {
		return "", "", fmt.Errorf("process %d has no cgroup for %s: %w", pid, controller, errdefs.ErrNotFound)
	}
	return group, root, nil
}
