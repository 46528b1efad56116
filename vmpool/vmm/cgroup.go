// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/cgroups/v3"
	"golang.org/x/sys/unix"
)

const cgroupRoot = "/sys/fs/cgroup"

// legacyControllers are the cgroup v1 hierarchies that a VMM is accounted in. On
// v2 there is one hierarchy.
var legacyControllers = []string{"cpu", "cpuacct", "memory", "pids"}

// Cgroup is the group of one VMM, in each hierarchy of the host that has it.
type Cgroup struct {
	path string
	dirs []string
}

// OpenCgroup names the group at path, below the root of each hierarchy, and
// makes nothing. On a host without cgroups it stands for no group.
func OpenCgroup(path string) *Cgroup {
	g := &Cgroup{path: path}
	if path == "" {
		return g
	}
	if cgroups.Mode() == cgroups.Unified {
		g.dirs = []string{filepath.Join(cgroupRoot, path)}
		return g
	}
	seen := make(map[string]bool)
	for _, name := range legacyControllers {
		// cpu and cpuacct are often one hierarchy, under two names.
		base, err := filepath.EvalSymlinks(filepath.Join(cgroupRoot, name))
		if err == nil && !seen[base] {
			seen[base] = true
			g.dirs = append(g.dirs, filepath.Join(base, path))
		}
	}
	return g
}

// Make makes the group. On cgroup v2 its parents hand down the controllers that
// they have. A group that is there already is taken.
func (g *Cgroup) Make() error {
	for _, dir := range g.dirs {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("make cgroup: %w", err)
		}
	}
	if cgroups.Mode() == cgroups.Unified && len(g.dirs) == 1 {
		enableControllers(filepath.Dir(g.dirs[0]))
	}
	return nil
}

// enableControllers turns controllers on from the root down to dir. One that
// cannot be had is done without: limits and figures are then missing, no VM.
func enableControllers(dir string) {
	rel, err := filepath.Rel(cgroupRoot, dir)
	if err != nil {
		return
	}
	at := cgroupRoot
	for _, part := range append([]string{"."}, strings.Split(rel, "/")...) {
		at = filepath.Join(at, part)
		for _, c := range []string{"+cpu", "+memory", "+pids", "+io"} {
			_ = os.WriteFile(filepath.Join(at, "cgroup.subtree_control"), []byte(c), 0)
		}
	}
}

// Add moves a process into the group, with all its threads.
func (g *Cgroup) Add(pid int) error {
	for _, dir := range g.dirs {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
			return fmt.Errorf("move process %d into its cgroup: %w", pid, err)
		}
	}
	return nil
}

// Remove removes the group, which the ends of its processes may keep busy for a
// moment. A group that is not there is no error.
func (g *Cgroup) Remove(ctx context.Context) error {
	var errs []error
	for _, dir := range g.dirs {
		errs = append(errs, removeCgroup(ctx, dir))
	}
	return errors.Join(errs...)
}

func removeCgroup(ctx context.Context, dir string) error {
	// The kernel tells nobody when the last process's exit is accounted for.
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		err := unix.Rmdir(dir)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("remove cgroup %s: %w", dir, err)
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("remove cgroup %s: %w", dir, err)
		}
	}
}
