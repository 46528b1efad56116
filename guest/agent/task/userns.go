// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package task

import (
	"fmt"
	"os"
	"slices"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// safeOptions are those that keep a mount's files from being more than data.
var safeOptions = []string{"nosuid", "nodev", "noexec"}

// safeMounts has a container in a user namespace get the safe options of its mounts. crun
// opens some mounts before it enters the namespace: those that are bound, mqueue, and the
// proc of a PID namespace that is joined. It forgets these options then, unless the mount is
// read-only (prepare_and_send_mount_mounts, init_container and do_mount of its
// src/libcrun/linux.c). It heeds the recursive ones, of directories; of files they are
// refused. There is nothing mounted below any of these.
func safeMounts(in []specs.Mount) ([]specs.Mount, error) {
	out := slices.Clone(in)
	for i := range out {
		m := &out[i]
		if m.Type != "bind" && m.Type != "mqueue" && m.Type != "proc" || slices.Contains(m.Options, "ro") {
			continue
		}
		var more []string
		for _, o := range m.Options {
			if slices.Contains(safeOptions, o) {
				more = append(more, "r"+o)
			}
		}
		if len(more) == 0 {
			continue
		}
		if m.Type == "bind" {
			info, err := os.Stat(m.Source)
			if err != nil {
				return nil, fmt.Errorf("mount %q: %w", m.Destination, err)
			}
			if !info.IsDir() {
				return nil, fmt.Errorf("mount %q: options %v of a file: want none in a pod with a user namespace: %w",
					m.Destination, m.Options, errdefs.ErrInvalidArgument)
			}
		}
		m.Options = append(slices.Clone(m.Options), more...)
	}
	return out, nil
}
