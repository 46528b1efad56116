// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package faults

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint/points"
)

const (
	// passes is how often a kubelet tries.
	passes = 5
	// comes is how long the point may be come to after the calls, in the background.
	comes = 10 * time.Second
	// sampleTime is for how long cells are begun on a node where not all are wanted.
	sampleTime = 100 * time.Second
	// away is how long after the caller has gone a hanging point goes on.
	away = 100 * time.Millisecond
)

// cell is one point, with one thing that happens there, in one scenario.
type cell struct {
	w      *world
	t      *testing.T
	p      failpoint.Point
	action string
	s      scenario
	k      *kubelet
	// seen is closed when the point was reached and done was what is done there.
	seen chan struct{}
	// vain says why nothing was done.
	vain error

	// died is how many containerds had ended before.
	died int

	lost, restarted, rebuilt bool
}

// actionsAt are those of a point.
func actionsAt(p failpoint.Point) []string {
	list := []string{failpoint.Fail, failpoint.Panic, failpoint.Kill, failpoint.Hang, killVMM}
	if inShim(p) {
		return append(list, killContainerd)
	}
	return append(list, killShim)
}

// TestFaults goes through the matrix: each point, what can happen there, and the scenarios
// that come to it, in an order that a seed gives. Without FAULTS=all each point has one of its
// cells, another for each seed, as long as there is time: see sampleTime.
func TestFaults(t *testing.T) {
	cells := plan(t)
	rng := seeded(t)
	whole := os.Getenv("FAULTS") == "all"
	for _, node := range []struct {
		name   string
		ready  int
		sample time.Duration
	}{{"pods", 0, sampleTime}, {"pool", 1, sampleTime / 2}} {
		t.Run(node.name, func(top *testing.T) {
			var w *world
			list := slices.DeleteFunc(slices.Clone(cells), func(c *cell) bool { return c.s.pool != (node.ready > 0) })
			rng.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
			if !whole {
				seen := map[failpoint.Point]bool{}
				list = slices.DeleteFunc(list, func(c *cell) bool {
					had := seen[c.p]
					seen[c.p] = true
					return had
				})
			}
			top.Logf("%d cells", len(list))
			var began time.Time // when the node was there
			for i, c := range list {
				if !whole && !began.IsZero() && time.Since(began) > testnode.Scale(node.sample) {
					top.Logf("%d cells are left to other seeds: there is no time for them", len(list)-i)
					break
				}
				top.Run(fmt.Sprintf("%s: %s: %s", strings.ReplaceAll(string(c.p), "/", "."), c.action, c.s.name), func(t *testing.T) {
					if w == nil {
						w = newWorld(top, node.ready, nil)
						began = time.Now()
					}
					c.w, c.t = w, t
					c.run()
				})
			}
		})
	}
}

// plan makes the list of all cells from the points that are declared, and fails if one has no
// scenario.
func plan(t *testing.T) []*cell {
	t.Helper()
	repo, err := testnode.FindRepo()
	require.NoError(t, err)
	all, err := points.All(repo)
	require.NoError(t, err)
	known := map[failpoint.Point]bool{}
	var cells []*cell
	for _, p := range all {
		known[p.Point] = true
		list := scenariosOf(p.Point)
		if unreached[p.Point] != "" || unreachedBy[os.Getenv("E2E_VMM")][p.Point] != "" {
			continue
		}
		require.NotEmpty(t, list, "no scenario comes to %s: give it one, or a reason for none, in scenario_test.go", p.Point)
		for _, s := range list {
			for _, action := range actionsAt(p.Point) {
				cells = append(cells, &cell{p: p.Point, action: action, s: s})
			}
		}
	}
	for p := range unreached {
		require.True(t, known[p], "%s is no point any more", p)
	}
	for p := range special {
		require.True(t, known[p], "%s is no point any more", p)
	}
	return cells
}

// seeded gives random numbers by CHAOS_SEED, or by a seed that the log tells.
func seeded(t *testing.T) *rand.Rand {
	t.Helper()
	seed, err := strconv.ParseUint(os.Getenv("CHAOS_SEED"), 10, 64)
	if err != nil {
		seed = uint64(time.Now().UnixNano()) % 1_000_000 //nolint:gosec // any will do
	}
	t.Logf("CHAOS_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// run goes through the cell.
func (c *cell) run() {
	t, w := c.t, c.w
	began := time.Now()
	c.k = newKubelet(w.Node, "cell", w.volume)
	from := logSize(w)
	if c.s.once {
		require.NoError(t, c.s.prepare(c), w.LogTail(4000))
	} else {
		require.NoError(t, c.retry(c.s.prepare), w.LogTail(4000))
	}
	before := c.k.pod
	c.k.calls = nil
	for p, action := range c.s.with {
		require.NoError(t, w.arm(p, action))
	}
	c.died = w.deaths
	require.NoError(t, w.arm(c.p, c.action0()))
	c.seen = make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background())
	go c.watch(ctx)
	err := c.retry(c.s.act)
	if err == nil {
		c.awaitBackground()
	}
	cancel()
	<-c.seen
	failed := c.k.failed()
	for _, f := range failed {
		t.Log(f)
	}
	assert.NoError(t, err, "it does not succeed in the end")
	if errors.Is(c.vain, errNobody) {
		t.Logf("%v", c.vain)
	} else if assert.NoError(t, c.vain) {
		c.judge(failed, before, from)
	}
	require.NoError(t, w.disarm())
	require.NoError(t, c.retry(down), w.LogTail(4000))
	if err := w.clean(); err != nil {
		assert.NoError(t, err)
		t.Log(c.logSince(from))
		w.renew()
	}
	t.Logf("%s", time.Since(began).Round(time.Millisecond))
}

// action0 is what is written into the file: those of our own hang there.
func (c *cell) action0() string {
	switch c.action {
	case killVMM, killShim, killContainerd:
		return failpoint.Hang
	}
	return c.action
}

// dies tells whether containerd is to end.
func (c *cell) dies() bool {
	switch c.action {
	case failpoint.Panic, failpoint.Kill:
		return !inShim(c.p)
	}
	return c.action == killContainerd
}

// endsPod tells whether the pod's VMM or shim is to end.
func (c *cell) endsPod() bool {
	switch c.action {
	case killVMM, killShim:
		return true
	case failpoint.Panic, failpoint.Kill:
		return inShim(c.p)
	}
	return false
}

// comesToPass waits until what is to happen at the point has happened. It returns false if
// nobody has come there.
func (c *cell) comesToPass() bool {
	if c.seen == nil || c.w.armed(c.p) {
		return false
	}
	<-c.seen
	return true
}

// awaitNotReady waits until CRI tells that the pod has ended, as kubelet does nothing before.
func (c *cell) awaitNotReady() error {
	ctx, cancel := limit(comes)
	defer cancel()
	id := c.k.pod
	return testnode.Eventually(ctx, func(ctx context.Context) error {
		r, err := c.w.Runtime().ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{Id: id}})
		if err != nil {
			return err
		}
		for _, p := range r.GetItems() {
			if id != "" && p.GetState() == runtimeapi.PodSandboxState_SANDBOX_READY {
				return fmt.Errorf("pod %.13s is ready after its end: %w", id, errdefs.ErrFailedPrecondition)
			}
		}
		return nil
	})
}

// retry does something until it succeeds, as kubelet would, and starts containerd if it
// ends.
func (c *cell) retry(do func(*cell) error) error {
	var err error
	for range passes {
		err = do(c)
		grace := time.Duration(0)
		if err != nil && c.dies() && c.seen != nil && !c.w.armed(c.p) && c.deaths() == 0 {
			grace = comes // the end of its connections is seen before its own
		}
		died, healErr := c.w.heal(grace)
		if healErr != nil {
			// Recovery may be what is under test: the next pass starts it once more.
			if err == nil {
				err = healErr
			}
			continue
		}
		if err == nil && !died {
			return nil
		}
		if err != nil && c.endsPod() && c.comesToPass() {
			if err := c.awaitNotReady(); err != nil {
				return err
			}
		}
	}
	if err == nil {
		err = fmt.Errorf("containerd ended %d times: %w", passes, errdefs.ErrUnavailable)
	}
	return err
}

// awaitBackground waits for a point that is come to after the calls, and lets what
// happens there happen.
func (c *cell) awaitBackground() {
	timer := time.NewTimer(testnode.Scale(comes))
	defer timer.Stop()
	select {
	case <-c.seen:
	case <-timer.C:
		return
	}
	if c.dies() && c.deaths() == 0 {
		_, err := c.w.heal(testnode.Scale(comes))
		assert.NoError(c.t, err)
	}
}

// deaths is how many containerds have ended since the point was armed.
func (c *cell) deaths() int { return c.w.deaths - c.died }

// watch does what is to be done while somebody hangs at the point.
func (c *cell) watch(ctx context.Context) {
	defer close(c.seen)
	if !c.w.await(ctx, c.p) {
		if c.w.armed(c.p) {
			c.vain = fmt.Errorf("nobody came to %s: %w", c.p, errdefs.ErrNotFound)
		}
		return
	}
	switch c.action {
	case failpoint.Hang:
		c.othersGoOn()
		c.k.leave()
		time.Sleep(away)
		c.vain = c.w.release(c.p)
	case killVMM, killShim, killContainerd:
		c.vain = kill(c.w.Node, c.action)
		c.vain = errors.Join(c.vain, c.w.release(c.p))
	}
}

// othersGoOn looks whether the node answers others while one hangs.
func (c *cell) othersGoOn() {
	if strings.HasPrefix(string(c.p), "recover/") {
		return // it is not there yet
	}
	ctx, cancel := limit(comes)
	defer cancel()
	_, err := c.w.Runtime().ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	assert.NoError(c.t, err, "a list while one hangs")
}

func logSize(w *world) int64 {
	st, err := os.Stat(w.LogPath())
	if err != nil {
		return 0
	}
	return st.Size()
}

// logSince is containerd's log from an offset on.
func (c *cell) logSince(from int64) string {
	f, err := os.Open(c.w.LogPath())
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	data, err := io.ReadAll(io.NewSectionReader(f, from, 1<<20))
	if err != nil {
		return err.Error()
	}
	return string(data)
}
