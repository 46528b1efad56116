// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package rootfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/vmpool"
)

const soon = 20 * time.Second

func (f *fixture) prebuild(ctx context.Context, chain string, turns Turns) error {
	return f.Prebuild(ctx, Source{Namespace: testNamespace, Snapshotter: "fake", Key: chain}, time.Now(), turns)
}

func (f *fixture) has(t *testing.T, chain string) bool {
	t.Helper()
	ok, err := f.Has(t.Context(), Source{Namespace: testNamespace, Snapshotter: "fake", Key: chain})
	require.NoError(t, err)
	return ok
}

func TestAPodFindsWhatWasPrebuilt(t *testing.T) {
	needRoot(t)
	f := newFixture(t)
	chain := f.sn.add("c1", layer(t, map[string]string{"a": "1"}))
	require.False(t, f.has(t, chain))
	require.NoError(t, f.prebuild(t.Context(), chain, vmpool.NewTurns()))
	require.True(t, f.has(t, chain))
	f.requireClean(t, 1)
	require.Empty(t, f.pins)
	img, err := f.get(t.Context(), "c1")
	require.NoError(t, err)
	require.Equal(t, 1, f.sn.made, "made once")
	require.FileExists(t, filepath.Join(mountImage(t, img.Path), "a"))
	require.ErrorIs(t, f.prebuild(t.Context(), chain, vmpool.NewTurns()), errdefs.ErrAlreadyExists)
	require.ErrorIs(t, f.prebuild(t.Context(), "sha256:none", vmpool.NewTurns()), errdefs.ErrNotFound)
	require.ErrorIs(t, f.prebuild(t.Context(), "c1", vmpool.NewTurns()), errdefs.ErrNotFound, "a container's own")
}

// gatedBuilder is a builder whose first child waits.
type gatedBuilder struct {
	*fixture
	t         *testing.T
	pid, gate string
	chain     string
}

func newGatedBuilder(t *testing.T) *gatedBuilder {
	t.Helper()
	needRoot(t)
	dir := t.TempDir()
	g := &gatedBuilder{fixture: newFixture(t), t: t, pid: filepath.Join(dir, "pid"), gate: filepath.Join(dir, "gate")}
	require.NoError(t, unix.Mkfifo(g.gate, 0o600))
	// The builder has no environment.
	g.cfg.Builder.Binary = script(t, fmt.Sprintf("PATH=%s:/usr/sbin:/sbin\n", os.Getenv("PATH"))+fmt.Sprintf(
		`[ -e %[1]s ] || { echo $$ > %[1]s.new; mv %[1]s.new %[1]s; read line < %[2]s; }; exec mkfs.erofs "$@"`, g.pid, g.gate))
	g.chain = g.sn.add("c1", layer(t, map[string]string{"a": strings.Repeat("x", 100000)}))
	return g
}

// begin prebuilds, and returns when the child runs.
func (g *gatedBuilder) begin(ctx context.Context, turns Turns) (result chan error, pid int) {
	g.t.Helper()
	result = make(chan error, 1)
	go func() { result <- g.prebuild(ctx, g.chain, turns) }()
	require.Eventually(g.t, func() bool {
		b, err := os.ReadFile(g.pid)
		if err != nil {
			return false
		}
		pid, err = strconv.Atoi(strings.TrimSpace(string(b)))
		return err == nil
	}, soon, time.Millisecond)
	return result, pid
}

// open lets the child go on.
func (g *gatedBuilder) open() {
	g.t.Helper()
	require.NoError(g.t, os.WriteFile(g.gate, []byte("\n"), 0))
}

// stat is a field of /proc/PID/stat, counted from the state, which is 0.
func stat(pid, field int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	return strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))[field]
}

func (g *gatedBuilder) awaitStat(pid, field int, want ...string) {
	g.t.Helper()
	require.Eventually(g.t, func() bool {
		return slices.Contains(want, stat(pid, field))
	}, soon, time.Millisecond, "field %d of the builder, want %v", field, want)
}

const statState, statNice = 0, 16

// A pod that needs the image joins, and hurries it.
func TestAPodJoinsAPrebuild(t *testing.T) {
	t.Parallel()
	g := newGatedBuilder(t)
	turns := vmpool.NewTurns()
	result, pid := g.begin(t.Context(), turns)
	g.awaitStat(pid, statNice, "19")
	defer turns.Begin()()
	g.awaitStat(pid, statState, "T")

	got := make(chan error, 1)
	go func() {
		_, err := g.get(t.Context(), "c1")
		got <- err
	}()
	g.awaitStat(pid, statState, "S", "R")
	g.awaitStat(pid, statNice, "10")
	require.Empty(t, got)
	g.open()
	require.NoError(t, <-result)
	require.NoError(t, <-got)
	require.Equal(t, 1, g.sn.made, "made once")
	g.requireClean(t, 1)
}

// What nobody waits for stands still while pods start, and goes on after two
// seconds even if they never end.
func TestAPrebuildGivesWay(t *testing.T) {
	t.Parallel()
	g := newGatedBuilder(t)
	turns := vmpool.NewTurns()
	result, pid := g.begin(t.Context(), turns)
	done := turns.Begin()
	g.awaitStat(pid, statState, "T")
	begin := time.Now()
	done()
	g.awaitStat(pid, statState, "S", "R")
	require.Less(t, time.Since(begin), time.Second, "it goes on when the pod has started")

	// And now one that does not end.
	defer turns.Begin()()
	g.awaitStat(pid, statState, "T")
	g.awaitStat(pid, statState, "S", "R")
	g.open()
	require.NoError(t, <-result)
	g.requireClean(t, 1)
}

// It does not begin before the pods that are being started have.
func TestAPrebuildWaitsItsTurn(t *testing.T) {
	t.Parallel()
	g := newGatedBuilder(t)
	turns := vmpool.NewTurns()
	done := turns.Begin()
	result := make(chan error, 1)
	go func() { result <- g.prebuild(t.Context(), g.chain, turns) }()
	require.NoError(t, os.WriteFile(g.pid, nil, 0o600)) // the first child does not wait
	_, err := g.get(t.Context(), "c1")
	require.NoError(t, err, "a pod does not wait for it")
	done()
	require.ErrorIs(t, <-result, errdefs.ErrAlreadyExists)
	require.Equal(t, 1, g.sn.made)
}

func TestACancelledPrebuildLeavesNothing(t *testing.T) {
	t.Parallel()
	g := newGatedBuilder(t)
	turns := vmpool.NewTurns()
	ctx, cancel := context.WithCancel(t.Context())
	result, pid := g.begin(ctx, turns)
	defer turns.Begin()()
	g.awaitStat(pid, statState, "T")
	cancel()
	require.ErrorIs(t, <-result, context.Canceled)
	require.ErrorIs(t, unix.Kill(pid, 0), unix.ESRCH)
	require.Empty(t, g.pins)
	require.Empty(t, g.background)
	g.requireClean(t, 0)
	_, err := g.get(t.Context(), "c1")
	require.NoError(t, err)
}

// The limits of what is made in the background are not a pod's.
func TestAPrebuildThatIsTooLarge(t *testing.T) {
	t.Parallel()
	g := newGatedBuilder(t)
	g.cfg.CacheLimit = 8192
	result, _ := g.begin(t.Context(), vmpool.NewTurns())
	got := make(chan error, 1)
	go func() {
		_, err := g.get(t.Context(), "c1")
		got <- err
	}()
	// Both have hold of the image once the pod waits.
	require.Eventually(t, func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		b := g.background[chainKey(testNamespace, "fake", g.sn.infos[g.chain])]
		return b != nil && b.urgent.Err() != nil
	}, soon, time.Millisecond)
	g.open()
	require.ErrorIs(t, <-result, errdefs.ErrResourceExhausted)
	require.NoError(t, <-got, "the pod makes its own")
	require.Equal(t, 2, g.sn.made)
	g.requireClean(t, 1)
}

// Without a pod it leaves nothing.
func TestAPrebuildThatIsTooLargeLeavesNothing(t *testing.T) {
	needRoot(t)
	f := newFixture(t)
	f.cfg.CacheLimit = 8192
	chain := f.sn.add("c1", layer(t, map[string]string{"a": strings.Repeat("x", 100000)}))
	require.ErrorIs(t, f.prebuild(t.Context(), chain, vmpool.NewTurns()), errdefs.ErrResourceExhausted)
	require.Equal(t, 1, f.sn.made, "its size was not known")
	f.sn.usage = 100000
	require.ErrorIs(t, f.prebuild(t.Context(), chain, vmpool.NewTurns()), errdefs.ErrResourceExhausted)
	require.Equal(t, 1, f.sn.made, "and now it was")
	f.requireClean(t, 0)
}

// cached puts an image of a size into the cache, which was used so long ago.
func (f *fixture) cached(t *testing.T, digit string, size int64, age time.Duration) string {
	t.Helper()
	key := strings.Repeat(digit, keyLen)
	require.NoError(t, os.WriteFile(f.path(key, imageSuffix), nil, 0o600))
	require.NoError(t, os.Truncate(f.path(key, imageSuffix), size))
	used := time.Now().Add(-age)
	require.NoError(t, os.Chtimes(f.path(key, imageSuffix), used, used))
	return key
}

func TestRoomForAPrebuild(t *testing.T) {
	t.Parallel()
	const pulled = time.Hour // ago
	for name, tc := range map[string]struct {
		size    int64
		want    int64 // 0: it does not fit
		removed string
	}{
		"as it is":                     {90, 100, ""},
		"the oldest goes":              {150, 200, "1"},
		"the two that are old":         {250, 500, "12"},
		"not what was used meanwhile":  {500, 0, ""},
		"what is larger than all that": {1 << 50, 0, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t)
			f.cfg.CacheLimit = 1000
			f.cached(t, "1", 100, 3*time.Hour)
			f.cached(t, "2", 300, 2*time.Hour)
			f.cached(t, "3", 500, time.Minute)
			// A pod's own does not count, and does not go.
			pin := f.Pin(f.cached(t, "4", 5000, 9*time.Hour))
			defer pin.Release()
			got, err := f.makeRoom(t.Context(), tc.size, time.Now().Add(-pulled))
			if tc.want == 0 {
				require.ErrorIs(t, err, errdefs.ErrResourceExhausted)
			} else {
				require.NoError(t, err)
			}
			require.Equal(t, tc.want, got)
			for _, digit := range []string{"1", "2", "3", "4"} {
				_, err := os.Stat(f.path(strings.Repeat(digit, keyLen), imageSuffix))
				require.Equal(t, strings.Contains(tc.removed, digit), errors.Is(err, os.ErrNotExist), digit)
			}
		})
	}
}
