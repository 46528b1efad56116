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

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/guest/api"
)

const (
	sysctlDir      = "/proc/sys"
	maxSysctlValue = 4 << 10
)

// setSysctls writes them in the order of names.
func setSysctls(dir string, all map[string]string) error {
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
