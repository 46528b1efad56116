// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmm

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/cgroups/v3"
	"github.com/stretchr/testify/require"
)

// testGroup is a cgroup of the test's own, with one in it.
func testGroup(t *testing.T) (outer, inner *Cgroup) {
	t.Helper()
	path := "/cloudhv-vmm-" + strconv.Itoa(os.Getpid())
	outer, inner = OpenCgroup(path), OpenCgroup(path+"/inner")
	if err := inner.Make(); err != nil {
		t.Skipf("no cgroups: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		require.NoError(t, errors.Join(inner.Remove(ctx), outer.Remove(ctx)))
	})
	return outer, inner
}

// read reads a file that is in one of the group's directories; "" if it is in none.
func (g *Cgroup) read(t *testing.T, name string) string {
	t.Helper()
	for _, dir := range g.dirs {
		text, err := os.ReadFile(filepath.Join(dir, name))
		if err == nil {
			return strings.TrimSpace(string(text))
		}
		require.ErrorIs(t, err, fs.ErrNotExist)
	}
	return ""
}

func TestLimit(t *testing.T) {
	outer, inner := testGroup(t)
	memory, cpu := "memory.limit_in_bytes", "cpu.cfs_quota_us"
	if cgroups.Mode() == cgroups.Unified {
		memory, cpu = "memory.max", "cpu.max"
	}
	if inner.read(t, memory) == "" {
		t.Skip("the host's cgroups do not limit memory")
	}
	limits := LimitsFor(Size{VCPUs: 2, MemoryBytes: 256 << 20}, 64<<20, 10)
	require.NoError(t, inner.Limit(limits))
	require.Equal(t, strconv.Itoa((256+4+64)<<20), inner.read(t, memory))
	if swap := inner.read(t, "memory.swap.max"); swap != "" {
		require.Equal(t, "0", swap)
	}
	if both := inner.read(t, memswFile); both != "" {
		require.Equal(t, strconv.Itoa((256+4+64)<<20), both)
	}
	require.True(t, strings.HasPrefix(inner.read(t, cpu), "300000"))
	require.Equal(t, strconv.Itoa(MaxVCPUs+10), inner.read(t, "pids.max"))

	// More than a group above has is no error, and less later neither.
	require.NoError(t, inner.Limit(Limits{MemoryBytes: 64 << 20, VCPUs: 1, Threads: 10}))
	if cgroups.Mode() != cgroups.Unified {
		require.NoError(t, inner.Limit(Limits{MemoryBytes: 64 << 20, VCPUs: 0, Threads: 10}))
	}
	require.NoError(t, outer.Limit(Limits{MemoryBytes: 64 << 20, VCPUs: 0, Threads: 10}))
	require.NoError(t, inner.Limit(Limits{MemoryBytes: 128 << 20, VCPUs: 3, Threads: 10}))
	require.NoError(t, OpenCgroup("").Limit(limits))
}

// A group goes with the processes that are left in it.
func TestRemoveKills(t *testing.T) {
	_, inner := testGroup(t)
	sleeper := exec.Command("sleep", "1000")
	require.NoError(t, sleeper.Start())
	require.NoError(t, inner.Add(sleeper.Process.Pid))
	require.True(t, inner.Exists())
	require.Error(t, inner.TryRemove())
	ended := make(chan error)
	go func() { ended <- sleeper.Wait() }()
	require.NoError(t, inner.Remove(t.Context()))
	require.ErrorContains(t, <-ended, "killed")
	require.False(t, inner.Exists())
	require.NoError(t, inner.Remove(t.Context()))
}
