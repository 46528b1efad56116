// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package plugin

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// locks keeps the lock files open for as long as the process lives.
var locks []*os.File

// lockFile is the first file in a directory of ours, and marks it.
const lockFile = "lock"

// lockDirs makes the directories and locks them: recovery removes what it does
// not know there, which must not be another containerd's.
func lockDirs(dirs ...string) error {
	var errs []error
	for _, dir := range dirs {
		f, err := lockDir(dir)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		locks = append(locks, f)
	}
	return errors.Join(errs...)
}

func lockDir(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, fmt.Errorf("make directory: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	if err := isOurs(dir); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock directory: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("%s is in use by another containerd: %w: %w", dir, err, errdefs.ErrFailedPrecondition)
	}
	return f, nil
}

// isOurs refuses a directory that others have filled, such as /etc by a slip in the
// configuration: recovery would remove what it does not know there.
func isOurs(dir string) error {
	if st, err := os.Lstat(filepath.Join(dir, lockFile)); err == nil && st.Mode().IsRegular() {
		return nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("read directory: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	for _, e := range entries {
		if e.Name() != "lost+found" { // of a file system of its own
			return fmt.Errorf("%s is not empty (%s) and was never this plugin's; give it a directory of its own: %w",
				dir, e.Name(), errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}
