// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	cg1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	"github.com/containerd/cgroups/v3/cgroup2"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// cgroupRoot is where cgroups are mounted.
const cgroupRoot = "/sys/fs/cgroup"

// moveWait bounds how long Metrics waits for a sandbox that has just started.
const moveWait = time.Second

// Metrics tells what a sandbox's VMM uses, from the host's point of view: the
// guest is not asked, as a silent one would hold up the statistics of the node.
// A sandbox that is not ready has none, which is ErrUnavailable.
func (c *Controller) Metrics(ctx context.Context, id string) (*types.Metric, error) {
	p, err := c.get(id)
	if err != nil {
		return nil, err
	}
	// Figures of before and after the move are not one count.
	wait, cancel := context.WithTimeout(ctx, moveWait)
	defer cancel()
	p.awaitMove(wait)
	rec := p.snapshot()
	if err := rec.ready(); err != nil {
		return nil, err
	}
	data, err := readUsage(&rec)
	if err != nil {
		return nil, fmt.Errorf("metrics of sandbox %q: %w", id, sentinel(err, errdefs.ErrUnavailable))
	}
	encoded, err := typeurl.MarshalAnyToProto(data)
	if err != nil {
		return nil, fmt.Errorf("encode metrics of sandbox %q: %w: %w", id, err, errdefs.ErrInternal)
	}
	return &types.Metric{Timestamp: timestamppb.Now(), ID: id, Data: encoded}, nil
}

// readUsage reads the VMM's cgroup or, where it has none, its process.
func readUsage(rec *record) (any, error) {
	if rec.Cgroup == "" {
		return processUsage(vmmPid(rec))
	}
	if cgroups.Mode() == cgroups.Unified {
		if _, err := os.Stat(filepath.Join(cgroupRoot, rec.Cgroup)); errors.Is(err, fs.ErrNotExist) {
			return processUsage(vmmPid(rec))
		}
		cg, err := cgroup2.Load(rec.Cgroup)
		if err != nil {
			return nil, fmt.Errorf("open cgroup: %w", err)
		}
		return cg.StatFiltered(cgroup2.StatCPU | cgroup2.StatMemory)
	}
	cg, err := cgroup1.Load(cgroup1.StaticPath(rec.Cgroup))
	if errors.Is(err, cgroup1.ErrCgroupDeleted) {
		return processUsage(vmmPid(rec))
	}
	if err != nil {
		return nil, fmt.Errorf("open cgroup: %w", err)
	}
	stats, err := cg.Stat(cgroup1.IgnoreNotExist)
	if err != nil {
		return nil, fmt.Errorf("read cgroup: %w", err)
	}
	if stats.GetCPU() == nil || stats.GetMemory() == nil {
		return processUsage(vmmPid(rec))
	}
	return stats, nil
}

// clockTick is the length of a clock tick of /proc, in nanoseconds: USER_HZ is
// 100 on every architecture we run on.
const clockTick = 1e9 / 100

// processUsage makes the same numbers of a process that has no cgroup.
func processUsage(pid uint32) (*cg1.Metrics, error) {
	dir := filepath.Join("/proc", strconv.Itoa(int(pid)))
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return nil, fmt.Errorf("read VMM process: %w: %w", err, errdefs.ErrUnavailable)
	}
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 22 {
		return nil, fmt.Errorf("unexpected stat of VMM process %d: %w", pid, errdefs.ErrInternal)
	}
	user, err1 := strconv.ParseUint(string(fields[11]), 10, 64)
	system, err2 := strconv.ParseUint(string(fields[12]), 10, 64)
	pages, err3 := strconv.ParseUint(string(fields[21]), 10, 64)
	if err := errors.Join(err1, err2, err3); err != nil {
		return nil, fmt.Errorf("unexpected stat of VMM process %d: %w: %w", pid, err, errdefs.ErrInternal)
	}
	rss := pages * uint64(os.Getpagesize())
	return &cg1.Metrics{
		CPU: &cg1.CPUStat{
			Usage: &cg1.CPUUsage{Total: (user + system) * clockTick, User: user * clockTick, Kernel: system * clockTick},
		},
		Memory: &cg1.MemoryStat{
			RSS: rss, TotalRSS: rss, Usage: &cg1.MemoryEntry{Usage: rss, Limit: 1<<63 - 1},
		},
	}, nil
}
