// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/log"
	"golang.org/x/sync/errgroup"

	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
	"github.com/cloudhv/containerd-cloudhv/vmpool/process"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// sweep removes what no record claims: scratch disks and processes. Both
// directories are locked, so nobody else's are in them.
func (c *Controller) sweep(ctx context.Context) error {
	claimed := map[string]bool{c.scratch.templatePath(): true}
	for _, p := range c.allPods() {
		claimed[p.snapshot().Scratch] = true
	}

	if err := failpoint.At(ctx, failpoint.RecoverSweep); err != nil {
		return err
	}
	c.killStrays(ctx, c.cfg.StateDir, c.scratch.dir, filepath.Join(c.cfg.CacheDir, poolScratch))
	c.sweepGroups(ctx)
	entries, err := os.ReadDir(c.scratch.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read scratch directory: %w", err)
	}
	var errs []error
	for _, e := range entries {
		path := filepath.Join(c.scratch.dir, e.Name())
		disk := strings.TrimSuffix(path, vmm.DisksDir(""))
		if claimed[disk] {
			continue
		}
		log.G(ctx).WithField("path", path).Info("removing a scratch disk that nobody claims")
		errs = append(errs, removeScratch(disk))
	}
	return errors.Join(errs...)
}

// killStrays kills the VMMs and shims whose command line names one of paths, or
// something in it, and that no sandbox claims.
func (c *Controller) killStrays(ctx context.Context, paths ...string) {
	if err := failpoint.At(ctx, failpoint.RecoverStrays); err != nil {
		log.G(ctx).WithError(err).Error("cannot look for processes that nobody claims")
		return
	}
	claimed := c.claimedPids()
	var g errgroup.Group
	for _, pid := range c.findProcesses(paths) {
		if claimed[pid] {
			continue
		}
		id, err := process.Identify(pid)
		if err != nil {
			continue // it has ended meanwhile
		}
		g.Go(func() error {
			h, err := id.Open()
			if err != nil {
				return nil
			}
			defer h.Close()
			log.G(ctx).WithField("pid", pid).Warn("killing a process of a sandbox that nobody claims")
			if err := h.Kill(ctx); err != nil {
				log.G(ctx).WithError(err).WithField("pid", pid).Error("cannot kill a process")
			}
			return nil
		})
	}
	_ = g.Wait()
}

// allPods is a copy, as a pod's lock is never taken under the controller's.
func (c *Controller) allPods() []*pod {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Collect(maps.Values(c.pods))
}

func (c *Controller) claimedPids() map[int]bool {
	claimed := map[int]bool{}
	if c.pool != nil {
		for _, pid := range c.pool.Pids() {
			claimed[pid] = true
		}
	}
	for _, p := range c.allPods() {
		rec := p.snapshot()
		if rec.VM != nil {
			claimed[rec.VM.Pid] = true
		}
		if rec.Shim != nil {
			claimed[rec.Shim.Pid] = true
		}
	}
	return claimed
}

// findProcesses lists the processes that run one of our programs in our mount
// namespace and whose command line names one of paths.
func (c *Controller) findProcesses(paths []string) []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	self, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return nil
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		proc := filepath.Join("/proc", e.Name())
		cmdline, err := os.ReadFile(filepath.Join(proc, "cmdline"))
		if err != nil || !slices.ContainsFunc(paths, func(p string) bool { return namesPath(cmdline, p) }) {
			continue
		}
		exe, err := os.Readlink(filepath.Join(proc, "exe"))
		if err != nil || !c.isOurs(exe) {
			continue
		}
		if ns, err := os.Readlink(filepath.Join(proc, "ns", "mnt")); err != nil || ns != self {
			continue
		}
		pids = append(pids, pid)
	}
	return pids
}

// isOurs is true for the programs that a sandbox's processes run.
func (c *Controller) isOurs(exe string) bool {
	name := filepath.Base(strings.TrimSuffix(exe, " (deleted)"))
	return name == filepath.Base(c.cfg.Shim) || strings.HasPrefix(name, "qemu-") || name == "cloud-hypervisor" ||
		c.cfg.QEMUBinary != "" && name == filepath.Base(c.cfg.QEMUBinary) ||
		c.cfg.CloudHypervisorBinary != "" && name == filepath.Base(c.cfg.CloudHypervisorBinary)
}

// namesPath is true if an argument of a command line contains the path, or one
// below it, and not merely one that begins alike.
func namesPath(cmdline []byte, path string) bool {
	for arg := range bytes.SplitSeq(cmdline, []byte{0}) {
		for {
			_, after, ok := bytes.Cut(arg, []byte(path))
			if !ok {
				break
			}
			if len(after) == 0 || after[0] == '/' || after[0] == ',' {
				return true
			}
			arg = after
		}
	}
	return false
}
