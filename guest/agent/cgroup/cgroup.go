// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package cgroup reads and steers a container's cgroup. It knows version 2 only,
// and only the handful of files that the API needs: containerd/cgroups would
// bring eBPF and D-Bus libraries into a binary that every VM pays for.
package cgroup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Mountpoint is where the agent mounts the hierarchy.
const Mountpoint = "/sys/fs/cgroup"

const (
	// maxFile bounds what is read of one file; cgroup.procs of a full pod is the longest.
	maxFile = 1 << 20
	// maxDepth and maxGroups bound the walk below a container's cgroup, which its
	// own root may have filled.
	maxDepth  = 16
	maxGroups = 4096
)

// Group is a cgroup by its absolute directory.
type Group string

// EnableControllers makes all controllers of g available to its children.
func (g Group) EnableControllers() error {
	b, err := g.read("cgroup.controllers")
	if err != nil {
		return err
	}
	var all []string
	for c := range strings.FieldsSeq(string(b)) {
		all = append(all, "+"+c)
	}
	if len(all) == 0 {
		return nil
	}
	return g.write("cgroup.subtree_control", strings.Join(all, " "))
}

// Kill sends SIGKILL to every process in g and below it.
func (g Group) Kill() error {
	return g.write("cgroup.kill", "1")
}

// Signal sends a signal to every process in g and below it.
func (g Group) Signal(sig unix.Signal) error {
	if sig == unix.SIGKILL {
		return g.Kill()
	}
	pids, err := g.Pids(maxFile)
	if err != nil {
		return err
	}
	var errs []error
	for _, pid := range pids {
		if err := unix.Kill(pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("signal process %d: %w", pid, err))
		}
	}
	return errors.Join(errs...)
}

// Pids are the processes in g and below it, at most limit.
func (g Group) Pids(limit int) ([]int, error) {
	var pids []int
	groups := 0
	var walk func(dir Group, depth int) error
	walk = func(dir Group, depth int) error {
		if groups++; groups > maxGroups || depth > maxDepth {
			return nil
		}
		b, err := dir.read("cgroup.procs")
		// A threaded cgroup has no list of processes: its parent's has them.
		if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
			return err
		}
		for f := range strings.FieldsSeq(string(b)) {
			// 0 is a process of another PID namespace's making: none of ours.
			if pid, err := strconv.Atoi(f); err == nil && pid > 0 && len(pids) < limit {
				pids = append(pids, pid)
			}
		}
		entries, err := os.ReadDir(string(dir))
		if err != nil {
			return fmt.Errorf("list cgroup: %w", err)
		}
		for _, e := range entries {
			if !e.IsDir() {
				continue
			}
			err := walk(dir+"/"+Group(e.Name()), depth+1)
			if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENODEV) {
				return err
			}
		}
		return nil
	}
	if err := walk(g, 0); err != nil {
		return nil, err
	}
	return pids, nil
}

// Remove deletes g and what is below it. Its processes are killed, and waited
// for until ctx ends.
func (g Group) Remove(ctx context.Context) error {
	err := g.rmdir(0)
	if !errors.Is(err, unix.EBUSY) {
		return err
	}
	if err := g.Kill(); err != nil {
		return err
	}
	if err := g.waitEmpty(ctx); err != nil {
		return err
	}
	return g.rmdir(0)
}

// rmdir removes directories from the leaves up.
func (g Group) rmdir(depth int) error {
	err := unix.Rmdir(string(g))
	switch {
	case err == nil, errors.Is(err, unix.ENOENT):
		return nil
	case depth > maxDepth:
		return fmt.Errorf("remove cgroup %s: too deep: %w", g, err)
	}
	entries, rerr := os.ReadDir(string(g))
	if errors.Is(rerr, fs.ErrNotExist) {
		return nil
	}
	if rerr != nil {
		return fmt.Errorf("list cgroup: %w", rerr)
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := (g + "/" + Group(e.Name())).rmdir(depth + 1); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(string(g)); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove cgroup %s: %w", g, err)
	}
	return nil
}

// waitEmpty waits until no process is left, by inotify on cgroup.events.
func (g Group) waitEmpty(ctx context.Context) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("watch cgroup: %w", err)
	}
	f := os.NewFile(uintptr(fd), "inotify")
	defer f.Close()
	if _, err := unix.InotifyAddWatch(fd, filepath.Join(string(g), "cgroup.events"), unix.IN_MODIFY); err != nil {
		return fmt.Errorf("watch cgroup %s: %w", g, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = f.Close() })
	defer stop()
	buf := make([]byte, unix.SizeofInotifyEvent+unix.NAME_MAX+1)
	for {
		v, err := g.flat("cgroup.events")
		if err != nil || v["populated"] == 0 {
			return err
		}
		if _, err := f.Read(buf); err != nil {
			return fmt.Errorf("wait for cgroup %s to be empty: %w", g, errors.Join(ctx.Err(), err))
		}
	}
}

func (g Group) read(file string) ([]byte, error) {
	f, err := os.Open(filepath.Join(string(g), file))
	if err != nil {
		return nil, fmt.Errorf("read cgroup: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile))
	if err != nil {
		return nil, fmt.Errorf("read cgroup: %w", err)
	}
	return b, nil
}

func (g Group) write(file, value string) error {
	f, err := os.OpenFile(filepath.Join(string(g), file), os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("write cgroup: %w", err)
	}
	defer f.Close()
	if _, err := f.WriteString(value); err != nil {
		return fmt.Errorf("write cgroup: %w", err)
	}
	return nil
}

// flat reads a file of "key value" lines. A file that is not there (a
// controller that is off) has no keys.
func (g Group) flat(file string) (map[string]uint64, error) {
	b, err := g.read(file)
	if errors.Is(err, fs.ErrNotExist) && g.exists() {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return parseFlat(b), nil
}

// number reads a file with one number; "max" is all ones. A file that is not
// there is 0.
func (g Group) number(file string) (uint64, error) {
	b, err := g.read(file)
	if errors.Is(err, fs.ErrNotExist) && g.exists() {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	return parseNumber(string(bytes.TrimSpace(b))), nil
}

func (g Group) exists() bool {
	_, err := os.Stat(string(g))
	return err == nil
}
