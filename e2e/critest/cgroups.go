// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// defaultCgroups are the directories in which pods have their cgroups whose
// configuration, as the suite's, names no parent. They lie outside of the node's own.
func defaultCgroups() ([]string, error) {
	v1, err1 := filepath.Glob("/sys/fs/cgroup/*/k8s.io")
	v2, err2 := filepath.Glob("/sys/fs/cgroup/k8s.io")
	return append(v1, v2...), errors.Join(err1, err2)
}

// removeCgroups removes those that were not there before. It fails for one in which a
// pod's is left.
func removeCgroups(before []string) error {
	now, err := defaultCgroups()
	errs := []error{err}
	for _, dir := range now {
		if slices.Contains(before, dir) {
			continue
		}
		if err := unix.Rmdir(dir); err != nil {
			errs = append(errs, fmt.Errorf("removing cgroup %s: %w", dir, err))
		}
	}
	return errors.Join(errs...)
}
