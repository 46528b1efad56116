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
	"slices"
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

// Limits bound what a VMM and its guest use of the host, whatever the guest does.
type Limits struct {
	// MemoryBytes is memory of all kinds. What the kernel can take back, as pages of files
	// that nobody has changed, it takes before anything is killed. None of it is swapped out: swap
	// would be memory beyond the limit, and keep a guest's secrets on the host's disk.
	MemoryBytes int64
	// VCPUs are vCPUs, for which there is one processor each, and one for the VMM.
	VCPUs int
	// Threads are threads and processes together.
	Threads int
}

// LimitsFor bounds a VM of a size by a VMM that needs so much memory beyond its
// guest's, and so many threads beside the vCPUs. The kernel's tables of the guest's
// memory are a part of it.
func LimitsFor(size Size, overheadBytes int64, threads int) Limits {
	const tables = 64
	return Limits{MemoryBytes: size.MemoryBytes + size.MemoryBytes/tables + overheadBytes, VCPUs: size.VCPUs, Threads: MaxVCPUs + threads}
}

// cpuPeriod is within what the processor time of Limits is counted, in microseconds.
const cpuPeriod = 100_000

const (
	quotaFile = "cpu.cfs_quota_us"
	memswFile = "memory.memsw.limit_in_bytes"
)

// Limit sets the group's limits, in the hierarchies that it is in. What is missing there
// is done without.
func (g *Cgroup) Limit(l Limits) error {
	quota := strconv.Itoa((l.VCPUs + 1) * cpuPeriod)
	memory, threads := strconv.FormatInt(l.MemoryBytes, 10), strconv.Itoa(l.Threads)
	files := [][2]string{
		// With swap, which is at no time less than without: one of the two comes in time.
		{memswFile, memory}, {"memory.limit_in_bytes", memory}, {memswFile, memory}, {"cpu.cfs_period_us", strconv.Itoa(cpuPeriod)}, {quotaFile, quota}, {"pids.max", threads},
	}
	if cgroups.Mode() == cgroups.Unified {
		files = [][2]string{{"memory.swap.max", "0"}, {"memory.max", memory}, {"cpu.max", quota + " " + strconv.Itoa(cpuPeriod)}, {"pids.max", threads}}
	}
	var errs []error
	for _, dir := range g.dirs {
		for i, f := range files {
			path := filepath.Join(dir, f[0])
			err := writeExisting(path, f[1])
			if errors.Is(err, unix.EINVAL) && f[0] == quotaFile {
				// Cgroup v1 takes no more than a group above has, which then bounds this one too.
				err = writeExisting(path, "-1")
			}
			if errors.Is(err, unix.EINVAL) && f[0] == memswFile && i == 0 {
				continue
			}
			// There is no file where the group lacks its controller.
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, fmt.Errorf("limit a cgroup: %w", err))
			}
		}
	}
	return errors.Join(errs...)
}

func writeExisting(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
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

// Kill kills the processes of the group.
func (g *Cgroup) Kill() {
	for _, dir := range g.dirs {
		killAll(dir)
	}
}

// Exists tells whether the group is there, in any hierarchy.
func (g *Cgroup) Exists() bool {
	return slices.ContainsFunc(g.dirs, func(dir string) bool {
		_, err := os.Stat(dir)
		return err == nil
	})
}

// Children are the names of the groups in it.
func (g *Cgroup) Children() []string {
	var names []string
	for _, dir := range g.dirs {
		entries, _ := os.ReadDir(dir) // one that is not there has none
		for _, e := range entries {
			if e.IsDir() && !slices.Contains(names, e.Name()) {
				names = append(names, e.Name())
			}
		}
	}
	return names
}

// TryRemove removes the group, unless there are processes in it, which is an error.
func (g *Cgroup) TryRemove() error {
	var errs []error
	for _, dir := range g.dirs {
		if err := unix.Rmdir(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove cgroup %s: %w", dir, err))
		}
	}
	return errors.Join(errs...)
}

// Remove removes the group, which the ends of its processes may keep busy for a
// moment. Processes that are left in it, as a VMM may have started if its guest has
// taken it over, are killed. A group that is not there is no error.
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
		killAll(dir)
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("remove cgroup %s: %w", dir, err)
		}
	}
}

// killAll kills the processes of a group. That they are in it is known only for a
// moment; whoever has left a VM's group since is a child of the same VMM.
func killAll(dir string) {
	procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return
	}
	for field := range strings.FieldsSeq(string(procs)) {
		if pid, err := strconv.Atoi(field); err == nil && pid > 1 {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
}
