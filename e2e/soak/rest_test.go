// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

func TestGrown(t *testing.T) {
	before := rest{containerd: testnode.Usage{Resident: 50 << 20, Heap: 20 << 20, Goroutines: 100, Files: 40}}
	for name, tc := range map[string]struct {
		change func(*rest)
		want   string
	}{
		"nothing":       {func(*rest) {}, ""},
		"less":          {func(r *rest) { r.containerd.Goroutines-- }, ""},
		"within bounds": {func(r *rest) { r.containerd.Resident += maxResident; r.cache += maxCache }, ""},
		"goroutine":     {func(r *rest) { r.containerd.Goroutines += maxMoment + 1 }, "goroutines"},
		"file":          {func(r *rest) { r.containerd.Files += maxMoment + 1 }, "open files"},
		"heap":          {func(r *rest) { r.containerd.Heap += maxHeap + 1 }, "heap"},
		"memory":        {func(r *rest) { r.containerd.Resident += maxResident + 1 }, "memory"},
		"state":         {func(r *rest) { r.state += maxState + 1 }, "state directory"},
		"cache":         {func(r *rest) { r.cache += maxCache + 1 }, "cache directory"},
		"root":          {func(r *rest) { r.root += maxRoot + 1 }, "root"},
	} {
		after := before
		tc.change(&after)
		errs := after.grown(before)
		if tc.want == "" {
			require.Empty(t, errs, name)
			continue
		}
		require.Len(t, errs, 1, name)
		require.ErrorIs(t, errs[0], errdefs.ErrOutOfRange)
		require.ErrorContains(t, errs[0], tc.want)
	}
}

func TestGrownCensus(t *testing.T) {
	require.NoError(t, grown(nil))
	require.NoError(t, grown([]string{"-1 goroutine a"}))
	err := grown([]string{"+2 process b", "-1 goroutine a"})
	require.ErrorContains(t, err, "+2 process b")
	require.NotContains(t, err.Error(), "goroutine a")
}

func TestAllocated(t *testing.T) {
	dir := t.TempDir()
	empty, err := allocated(dir)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "a"), make([]byte, 1<<20), 0o600))
	require.NoError(t, os.Link(filepath.Join(dir, "a"), filepath.Join(dir, "b")))
	hole, err := os.OpenFile(filepath.Join(dir, "c"), os.O_CREATE|os.O_WRONLY, 0o600)
	require.NoError(t, err)
	require.NoError(t, hole.Truncate(1<<30))
	require.NoError(t, hole.Close())
	got, err := allocated(dir)
	require.NoError(t, err)
	require.InDelta(t, 1<<20, got-empty, 64<<10)
	none, err := allocated(filepath.Join(dir, "none"))
	require.NoError(t, err)
	require.Zero(t, none)
}

func TestTable(t *testing.T) {
	at := time.Now()
	text := table([]rest{{when: "the beginning", at: at}, {when: "100 in a row", at: at.Add(90 * time.Second), done: 100}})
	lines := strings.Split(strings.TrimSpace(text), "\n")
	require.Len(t, lines, 3)
	require.Contains(t, lines[2], "1.5")
	require.Contains(t, lines[2], "100 in a row")
}
