// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmpool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sync/semaphore"

	"github.com/cloudhv/containerd-cloudhv/vmpool/snapshot"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmmtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// soon bounds what must happen by itself.
const soon = 20 * time.Second

var errTest = errors.New("on purpose")

// fakeGuest answers as it is told.
type fakeGuest struct {
	ready, warm atomic.Pointer[func(id string) error]
	warmed      atomic.Int32
}

func (g *fakeGuest) Ready(ctx context.Context, vm vmm.VM) error {
	if f := g.ready.Load(); f != nil {
		if err := (*f)(vm.ID()); err != nil {
			return err
		}
	}
	return ctx.Err()
}

func (g *fakeGuest) WarmUp(ctx context.Context, vm vmm.VM) error {
	g.warmed.Add(1)
	if f := g.warm.Load(); f != nil {
		if err := (*f)(vm.ID()); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// rig is a pool with a fake driver.
type rig struct {
	t      *testing.T
	dir    string
	driver *vmmtest.Driver
	guest  *fakeGuest
	store  *snapshot.Store
	cfg    Config
	pool   *Pool
}

func newRig(t *testing.T, change ...func(*Config)) *rig {
	t.Helper()
	// Sockets' paths are short.
	dir, err := os.MkdirTemp("", "pool")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	r := &rig{t: t, dir: dir, driver: vmmtest.New(), guest: &fakeGuest{}}
	t.Cleanup(r.driver.Stop)
	kernel := filepath.Join(dir, "kernel")
	require.NoError(t, os.WriteFile(kernel, []byte("k"), 0o600))
	size := vmm.Size{VCPUs: 1, MemoryBytes: 128 << 20}
	r.cfg = Config{
		Driver: r.driver, Guest: r.guest,
		Inputs: snapshot.Inputs{Driver: vmmtest.Name, Size: vmm.Size{VCPUs: 1, MemoryBytes: 1 << 20}},
		Machine: vmm.Config{
			Kernel: kernel, RootFS: kernel, ConsoleLimit: 64 << 10, Size: size, Max: vmm.Size{VCPUs: 4, MemoryBytes: 1 << 30},
		},
		Dir: filepath.Join(dir, "p"), ScratchDir: filepath.Join(dir, "scratch"),
		NewScratch: func(_ context.Context, path string) error { return os.WriteFile(path, []byte("empty"), 0o600) },
		Demand:     Demand{Min: 2, Max: 8, Window: time.Second, Horizon: time.Minute},
		Parallel:   2, Warm: true,
		SnapshotLimit: soon, ReadyLimit: soon, CheckLimit: time.Second,
	}
	for _, f := range change {
		f(&r.cfg)
	}
	r.start(nil)
	t.Cleanup(func() { assert.NoError(t, r.pool.Close()) })
	return r
}

// start makes the pool as a process does that begins.
func (r *rig) start(owned []string) {
	r.t.Helper()
	var err error
	r.store, err = snapshot.Open(filepath.Join(r.dir, "snapshots"))
	require.NoError(r.t, err)
	r.cfg.Store = r.store
	r.pool, err = New(r.cfg)
	require.NoError(r.t, err)
	require.NoError(r.t, r.pool.Recover(r.t.Context(), func(dir string) bool { return slices.Contains(owned, dir) }))
	r.pool.Run()
}

// restart ends the process and starts another.
func (r *rig) restart(owned ...string) {
	r.t.Helper()
	require.NoError(r.t, r.pool.Close())
	r.start(owned)
}

func (r *rig) eventually(what string, f func(Status) bool) {
	r.t.Helper()
	require.Eventually(r.t, func() bool { return f(r.pool.Status()) }, soon, 2*time.Millisecond, what)
}

func (r *rig) full(n int) {
	r.t.Helper()
	r.eventually("the pool is full", func(s Status) bool { return s.Ready == n && s.Making == 0 })
}

// gone waits until VMs have ended, which the driver learns after their processes have.
func (r *rig) gone(ids ...string) {
	r.t.Helper()
	r.eventually("they have ended", func(Status) bool {
		return !slices.ContainsFunc(r.driver.VMs(), func(id string) bool { return slices.Contains(ids, id) })
	})
}

func (r *rig) acquire(owner string) *VM {
	r.t.Helper()
	vm, err := r.pool.Acquire(r.t.Context(), Request{Owner: owner})
	require.NoError(r.t, err)
	return vm
}

// left checks that so many VMs are there, and nothing of others.
func (r *rig) left(vms int) {
	r.t.Helper()
	count := func(dir string) int {
		entries, err := os.ReadDir(dir)
		require.NoError(r.t, err)
		return len(entries)
	}
	assert.Eventually(r.t, func() bool {
		return len(r.driver.VMs()) == vms && count(r.cfg.Dir) == vms && count(r.cfg.ScratchDir) == vms
	}, soon, 2*time.Millisecond)
}

func TestHit(t *testing.T) {
	r := newRig(t)
	r.full(2)
	for _, id := range r.driver.VMs() {
		seen, _ := r.driver.Seen(id)
		assert.True(t, seen.Paused, "a ready VM costs no processor time")
	}
	a, b := r.acquire("a"), r.acquire("b")
	assert.Equal(t, Hit, a.Outcome)
	assert.NotEqual(t, a.ID(), b.ID(), "a VM serves one pod")
	seen, _ := r.driver.Seen(a.ID())
	assert.False(t, seen.Paused)
	assert.FileExists(t, a.Scratch)
	r.full(2)
	require.NoError(t, r.pool.Discard(t.Context(), a))
	require.NoError(t, r.pool.Discard(t.Context(), a), "it can be repeated")
	require.NoError(t, r.pool.Discard(t.Context(), b))
	r.pool.Drain()
	r.full(0)
	r.left(0)
	assert.Equal(t, 2, r.pool.Status().Outcomes[Hit])
	c := r.acquire("c")
	assert.Equal(t, Miss, c.Outcome)
	require.NoError(t, r.pool.Discard(t.Context(), c))
	assert.Zero(t, r.pool.Status().Outran, "there were to be none")
}

func TestMiss(t *testing.T) {
	r := newRig(t, func(c *Config) {
		c.Demand = Demand{Window: time.Second, Horizon: time.Minute}
		c.Slots = semaphore.NewWeighted(1)
	})
	r.eventually("the snapshot is made", func(s Status) bool { return s.Usable })
	vm := r.acquire("a")
	assert.Equal(t, Miss, vm.Outcome)
	assert.Equal(t, r.pool.Status().Key, vm.Key())
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	_, err := r.pool.Acquire(ctx, Request{Owner: "b"})
	require.ErrorIs(t, err, context.DeadlineExceeded, "it waits for its turn")
	vm.Settled()
	vm.Settled()
	next := r.acquire("b")
	next.Settled()
	require.NoError(t, r.pool.Discard(t.Context(), next))
	require.NoError(t, r.pool.Discard(t.Context(), vm))
	r.left(0)
}

// TestOutrun has pods come while no VM can be made ready.
func TestOutrun(t *testing.T) {
	r := newRig(t)
	r.full(2)
	fail := func(string) error { return errTest }
	r.guest.warm.Store(&fail)
	for i, want := range []Outcome{Hit, Hit, Miss, Miss} {
		vm := r.acquire(fmt.Sprint(i))
		assert.Equal(t, want, vm.Outcome)
		assert.Equal(t, max(0, i-1), r.pool.Status().Outran)
		require.NoError(t, r.pool.Discard(t.Context(), vm))
	}
}

// TestNoSnapshot lets the making of a snapshot fail at each step: pods have to
// boot, nothing is left, and the reason is told.
func TestNoSnapshot(t *testing.T) {
	for _, op := range []vmmtest.Op{vmmtest.OpBoot, vmmtest.OpPause, vmmtest.OpSnapshot, vmmtest.OpDisconnect, vmmtest.OpKill} {
		r := newRig(t)
		r.full(2)
		r.pool.Drain()
		r.full(0)
		require.NoError(t, r.store.SetAside(r.pool.key))
		r.driver.Fail(op, errTest)
		_, err := r.pool.Acquire(t.Context(), Request{Owner: "a"})
		require.ErrorIs(t, err, ErrNone, op)
		r.eventually("it says why", func(s Status) bool { return errors.Is(s.Err, errTest) })
		r.driver.Fail(op, nil)
		r.pool.Fill()
		r.full(2)
		assert.NoError(t, r.pool.Status().Err, op)
	}
}

// TestBadVM lets ready VMs die or fall silent: none is handed out.
func TestBadVM(t *testing.T) {
	r := newRig(t)
	r.full(2)
	dead := r.driver.VMs()[0]
	r.driver.Die(dead)
	r.eventually("it is replaced", func(s Status) bool {
		return s.Ready == 2 && s.Making == 0 && !slices.Contains(r.driver.VMs(), dead)
	})
	silent := r.driver.VMs()
	say := func(id string) error {
		if slices.Contains(silent, id) {
			return errTest
		}
		return nil
	}
	check := func(_ context.Context, vm vmm.VM) error { return say(vm.ID()) }
	var got []*VM
	for range silent {
		// A pod does not try them all: it is restored one.
		vm, err := r.pool.Acquire(t.Context(), Request{Owner: "a", Check: check})
		require.NoError(t, err)
		assert.NotContains(t, silent, vm.ID())
		got = append(got, vm)
	}
	r.gone(silent...)
	for _, vm := range got {
		assert.False(t, isClosed(vm.Done()), "what a pod was given instead is not ended")
		require.NoError(t, r.pool.Discard(t.Context(), vm))
	}
}

// TestBadSnapshot lets restores fail: pods boot, and after three failures the
// snapshot is made anew.
func TestBadSnapshot(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Demand.Min, c.Demand.Max = 0, 0 })
	r.eventually("the snapshot is made", func(s Status) bool { return s.Usable })
	r.driver.Fail(vmmtest.OpRestore, errTest)
	for range badSnapshot {
		_, err := r.pool.Acquire(t.Context(), Request{Owner: "a"})
		require.ErrorIs(t, err, ErrNone)
		require.ErrorIs(t, err, errTest)
	}
	r.driver.Fail(vmmtest.OpRestore, nil)
	list, err := r.store.List()
	require.NoError(t, err)
	assert.True(t, slices.ContainsFunc(list, func(i snapshot.Info) bool { return i.Damaged }))
	r.eventually("another is made", func(s Status) bool { return s.Usable })
	vm := r.acquire("a")
	assert.Equal(t, Miss, vm.Outcome)
	require.NoError(t, r.pool.Discard(t.Context(), vm))
	r.left(0)
}

// TestBackoff lets the refill fail: it pauses longer each time, and recovers.
func TestBackoff(t *testing.T) {
	r := newRig(t)
	r.full(2)
	fail := func(string) error { return errTest }
	r.guest.warm.Store(&fail)
	before := r.guest.warmed.Load()
	vm := r.acquire("a")
	r.eventually("it fails", func(s Status) bool { return errors.Is(s.Err, errTest) })
	assert.LessOrEqual(t, r.guest.warmed.Load()-before, int32(2), "it does not spin")
	r.guest.warm.Store(nil)
	r.full(2)
	require.NoError(t, r.pool.Status().Err)
	require.NoError(t, r.pool.Discard(t.Context(), vm))
}

func TestRestart(t *testing.T) {
	r := newRig(t)
	r.full(2)
	pods := r.acquire("pod")
	r.full(2)
	lost := r.acquire("gone")
	r.full(2)
	before := r.driver.VMs()
	r.restart(pods.Dir)
	r.full(2)
	r.gone(lost.ID())
	assert.Contains(t, r.driver.VMs(), pods.ID())
	assert.Equal(t, len(before)-1, len(r.driver.VMs()), "the ready ones were adopted")
	next := r.acquire("b")
	assert.Contains(t, before, next.ID())
	// The next process's pod ends a VM that an earlier one acquired.
	state := pods.State()
	require.NoError(t, pods.Kill(t.Context()))
	require.NoError(t, pods.Close())
	require.NoError(t, r.pool.Forget(t.Context(), &state))
	require.NoError(t, r.pool.Forget(t.Context(), &state))
	assert.NoDirExists(t, pods.Dir)
	assert.NoFileExists(t, pods.Scratch)
	require.NoError(t, r.pool.Discard(t.Context(), next))
}

// TestUpgrade starts a process that wants another snapshot: the VMs of the first
// go, and the old snapshot with them.
func TestUpgrade(t *testing.T) {
	r := newRig(t)
	r.full(2)
	old, oldKey := r.driver.VMs(), r.pool.Status().Key
	r.cfg.Inputs.Kernel = "another"
	r.restart()
	r.full(2)
	r.gone(old...)
	assert.NotEqual(t, oldKey, r.pool.Status().Key)
	list, err := r.store.List()
	require.NoError(t, err)
	assert.Len(t, list, 1)
}

// TestCrash leaves what a process leaves that is killed at each step.
func TestCrash(t *testing.T) {
	r := newRig(t)
	r.full(2)
	for name, rec := range map[string]string{
		"empty": "", "damaged": "{", "planned": `{"version":1,"id":"planned"}`,
		"dead": `{"version":1,"id":"dead","key":"k","vm":{"driver":"fake","id":"dead","pid":1,"start_time":1}}`,
	} {
		dir := filepath.Join(r.cfg.Dir, name)
		require.NoError(t, os.Mkdir(dir, 0o700))
		if rec != "" {
			require.NoError(t, os.WriteFile(filepath.Join(dir, recordFile), []byte(rec), 0o600))
		}
		require.NoError(t, os.WriteFile(r.pool.scratch(name), nil, 0o600))
	}
	require.NoError(t, os.WriteFile(r.pool.scratch("nobodys"), nil, 0o600))
	r.restart()
	r.full(2)
	r.left(2)
}

// TestUnreachable lets the next process fail to take up the VMs: they are killed.
func TestUnreachable(t *testing.T) {
	r := newRig(t)
	r.full(2)
	old := r.driver.VMs()
	require.NoError(t, r.pool.Close())
	r.driver.Fail(vmmtest.OpAttach, errTest)
	r.start(nil)
	r.full(2)
	r.gone(old...)
	r.left(2)
}

// TestCrowd lets a hundred pods come at once to a pool of eight.
func TestCrowd(t *testing.T) {
	r := newRig(t)
	r.full(2)
	var mu sync.Mutex
	ids := map[string]bool{}
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			vm, err := r.pool.Acquire(t.Context(), Request{Owner: "crowd"})
			if !assert.NoError(t, err) {
				return
			}
			mu.Lock()
			assert.False(t, ids[vm.ID()], "a VM serves one pod")
			ids[vm.ID()] = true
			mu.Unlock()
			assert.NoError(t, r.pool.Discard(t.Context(), vm))
		})
	}
	wg.Wait()
	assert.Len(t, ids, 100)
	r.full(8) // the cap
	s := r.pool.Status()
	assert.Equal(t, 100, s.Outcomes[Hit]+s.Outcomes[Miss])
	r.left(8)
}

// TestMemoryBound keeps the pool within the memory that it may hold.
func TestMemoryBound(t *testing.T) {
	r := newRig(t, func(c *Config) { c.MaxMemory, c.VMMemory = 100, 70 })
	r.full(1)
	assert.Equal(t, 1, r.pool.Status().Target)
}
