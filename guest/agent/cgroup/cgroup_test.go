// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package cgroup

import (
	"context"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/testing/protocmp"

	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

func fake(t *testing.T, files map[string]string) Group {
	t.Helper()
	dir := t.TempDir()
	for name, data := range files {
		path := filepath.Join(dir, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, []byte(data), 0o644))
	}
	return Group(dir)
}

func TestStats(t *testing.T) {
	t.Parallel()
	g := fake(t, map[string]string{
		"cpu.stat":       "usage_usec 12\nuser_usec 7\nsystem_usec 5\nnr_periods 3\nnr_throttled 2\nthrottled_usec 1\nbroken\n",
		"memory.current": "4096\n", "memory.max": "max\n", "memory.peak": "8192\n",
		"memory.stat":   "anon 10\nfile 20\n",
		"memory.events": "low 1\nhigh 2\nmax 3\noom 4\noom_kill 5\n",
		"pids.current":  "6\n", "pids.max": "max\n",
		"io.stat": "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0\n254:16\nx y\n",
	})
	got, err := g.Stats()
	require.NoError(t, err)
	want := &guestv1.StatsResponse{
		Cpu:    &guestv1.CPUStats{UsageUsec: 12, UserUsec: 7, SystemUsec: 5, NrPeriods: 3, NrThrottled: 2, ThrottledUsec: 1},
		Memory: &guestv1.MemoryStats{Usage: 4096, UsageLimit: math.MaxUint64, MaxUsage: 8192, Stat: map[string]uint64{"anon": 10, "file": 20}, Low: 1, High: 2, Max: 3, Oom: 4, OomKill: 5},
		Pids:   &guestv1.PidsStats{Current: 6, Limit: math.MaxUint64},
		Io:     []*guestv1.IOStats{{Major: 254, Rbytes: 1, Wbytes: 2, Rios: 3, Wios: 4}},
	}
	require.Empty(t, cmp.Diff(want, got, protocmp.Transform()))

	ooms, err := g.OOMKills()
	require.NoError(t, err)
	require.EqualValues(t, 5, ooms)

	// Controllers that are off have no files, but a cgroup that is gone is an error.
	got, err = fake(t, nil).Stats()
	require.NoError(t, err)
	require.Zero(t, got.GetMemory().GetUsage())
	_, err = Group(filepath.Join(t.TempDir(), "none")).Stats()
	require.ErrorIs(t, err, os.ErrNotExist)
}

func TestPids(t *testing.T) {
	t.Parallel()
	g := fake(t, map[string]string{"cgroup.procs": "1\n0\n22\nx\n", "sub/cgroup.procs": "333\n", "sub/deeper/cgroup.procs": "4444\n"})
	pids, err := g.Pids(100)
	require.NoError(t, err)
	require.ElementsMatch(t, []int{1, 22, 333, 4444}, pids)
	pids, err = g.Pids(2)
	require.NoError(t, err)
	require.Len(t, pids, 2)
}

func FuzzParse(f *testing.F) {
	f.Add("a 1\nb 2")
	f.Add("8:0 rbytes=1")
	f.Fuzz(func(_ *testing.T, s string) {
		parseFlat([]byte(s))
		parseIO(s)
		parseNumber(s)
	})
}

// realGroup is a cgroup of the test's own in the host's version 2 hierarchy.
func realGroup(t *testing.T) Group {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	for _, root := range []string{"/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
		if _, err := os.Stat(filepath.Join(root, "cgroup.procs")); err != nil {
			continue
		}
		if _, err := os.Stat(filepath.Join(root, "cgroup.subtree_control")); err != nil {
			continue
		}
		dir := filepath.Join(root, fmt.Sprintf("agent-cgroup-test-%d", os.Getpid()))
		require.NoError(t, os.Mkdir(dir, 0o755))
		return Group(dir)
	}
	t.Skip("needs cgroup v2")
	return ""
}

func TestRealGroup(t *testing.T) {
	t.Parallel()
	g := realGroup(t)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(func() { require.NoError(t, g.Remove(context.Background())) })
	defer cancel()
	sub := g + "/a"
	require.NoError(t, os.Mkdir(string(sub), 0o755))
	dir, err := os.Open(string(sub))
	require.NoError(t, err)
	defer dir.Close()
	start := func() *exec.Cmd {
		cmd := exec.Command("sleep", "1000")
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd()), Pdeathsig: syscall.SIGKILL}
		require.NoError(t, cmd.Start())
		return cmd
	}
	first := start()
	pids, err := g.Pids(10)
	require.NoError(t, err)
	require.Equal(t, []int{first.Process.Pid}, pids)
	require.NoError(t, g.Signal(syscall.SIGTERM))
	require.Error(t, first.Wait())

	// A removal kills what is left, waits for it, and may be repeated.
	second := start()
	waited := make(chan error, 1)
	go func() { waited <- second.Wait() }()
	require.NoError(t, g.Remove(ctx))
	require.Error(t, <-waited)
	require.NoError(t, g.Remove(ctx))
	require.NoDirExists(t, string(g))
}
