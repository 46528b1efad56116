// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmpool

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/vmpool/snapshot"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmmtest"
)

// await waits for the pool, as a caller from outside does.
func (r *rig) await(done func(Status) bool) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), soon)
	defer cancel()
	s, err := r.pool.Await(ctx, done)
	require.NoError(r.t, err, "%+v", s)
}

func empty(s Status) bool { return s.Ready+s.Making+s.Ending == 0 }

func (r *rig) snapshots() []SnapshotInfo {
	r.t.Helper()
	list, err := r.pool.Snapshots()
	require.NoError(r.t, err)
	return list
}

func TestDrainAndFill(t *testing.T) {
	r := newRig(t)
	r.full(2)
	r.pool.Drain()
	r.await(empty)
	r.left(0)
	for range 3 {
		vm := r.acquire("a")
		assert.Equal(t, Miss, vm.Outcome)
		require.NoError(t, r.pool.Discard(t.Context(), vm))
	}
	assert.True(t, empty(r.pool.Status()), "what pods ask for fills no drained pool")
	r.pool.Fill()
	r.await(func(s Status) bool { return s.Ready >= 2 && !s.Drained })
	assert.Equal(t, Hit, r.acquire("a").Outcome)
}

// TestDrainWhileASnapshotIsMade does not wait for that.
func TestDrainWhileASnapshotIsMade(t *testing.T) {
	r := newRig(t)
	r.full(2)
	booting, goOn := make(chan struct{}), make(chan struct{})
	block := func(string) error {
		close(booting)
		<-goOn
		return errTest
	}
	r.guest.ready.Store(&block)
	require.NoError(t, r.store.SetAside(r.pool.key))
	r.pool.poke()
	<-booting
	r.guest.ready.Store(nil)
	r.pool.Drain()
	r.await(empty)
	close(goOn)
	r.left(0)
}

// TestFillTo asks for a number, which is kept for as long as the pool remembers.
func TestFillTo(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Demand = Demand{Max: 5, Window: time.Second, Horizon: time.Second} })
	err := r.pool.FillTo(6)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, "the pool may have 5")
	require.NoError(t, r.pool.FillTo(5))
	r.await(func(s Status) bool { return s.Ready == 5 })
	vm := r.acquire("a")
	assert.Equal(t, Hit, vm.Outcome)
	require.NoError(t, r.pool.Discard(t.Context(), vm))
	r.await(func(s Status) bool { return s.Target < 5 })
	r.await(empty)
	r.left(0)

	require.NoError(t, r.pool.FillTo(5))
	r.pool.Fill()
	assert.LessOrEqual(t, r.pool.Status().Target, 1, "what was asked for is undone")
}

func TestFillToIsBoundByMemory(t *testing.T) {
	r := newRig(t, func(c *Config) { c.MaxMemory, c.VMMemory = 300<<20, 100<<20 })
	require.NoError(t, r.pool.FillTo(3))
	require.ErrorContains(t, r.pool.FillTo(4), "its memory (300 MiB, at 100 MiB each)")
	r.full(3)
}

// TestDrainWhilePodsStart drains and fills while pods come: each has a VM of its own.
func TestDrainWhilePodsStart(t *testing.T) {
	r := newRig(t)
	r.full(2)
	var wg sync.WaitGroup
	for range 60 {
		wg.Go(func() {
			vm, err := r.pool.Acquire(t.Context(), Request{Owner: "a"})
			if assert.NoError(t, err) {
				assert.NoError(t, r.pool.Discard(t.Context(), vm))
			}
		})
	}
	for range 10 {
		wg.Go(r.pool.Drain)
		wg.Go(r.pool.Fill)
	}
	wg.Wait()
	r.pool.Drain()
	r.await(empty)
	r.left(0)
	o := r.pool.Status().Outcomes
	assert.Equal(t, 60, o[Hit]+o[Miss])
}

func TestAwait(t *testing.T) {
	r := newRig(t)
	r.full(2)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	s, err := r.pool.Await(ctx, func(s Status) bool { return s.Ready == 3 })
	require.ErrorIs(t, err, context.DeadlineExceeded)
	assert.Equal(t, 2, s.Ready)
	ended := make(chan error, 1)
	go func() {
		_, err := r.pool.Await(t.Context(), func(s Status) bool { return s.Ready == 3 })
		ended <- err
	}()
	time.Sleep(10 * time.Millisecond)
	require.NoError(t, r.pool.Close())
	require.ErrorIs(t, <-ended, ErrOff)
	_, err = r.pool.Rebuild(t.Context())
	require.ErrorIs(t, err, ErrOff)
}

func TestList(t *testing.T) {
	r := newRig(t, func(c *Config) { c.Demand.Min, c.Demand.Max = 2, 2 })
	r.full(2)
	vm := r.acquire("pod")
	r.full(2)
	list := r.pool.List()
	require.Len(t, list, 2, "a pod's VM is the pod's")
	for _, v := range list {
		assert.NotEqual(t, vm.ID(), v.ID)
		assert.True(t, v.Ready)
		assert.Equal(t, r.pool.Status().Key, v.Snapshot)
		assert.Equal(t, filepath.Join(r.cfg.Dir, v.ID), v.Dir)
		assert.WithinDuration(t, time.Now(), v.Made, time.Minute)
		assert.Positive(t, v.VM.Pid)
	}
	r.restart(vm.Dir)
	r.full(2)
	assert.Equal(t, list, r.pool.List(), "the same after a restart")
}

// TestRebuild makes the snapshot anew beside pods that use the old one.
func TestRebuild(t *testing.T) {
	r := newRig(t)
	r.full(2)
	old := r.pool.Status().Key
	pod := r.acquire("pod")
	id, err := r.pool.Rebuild(t.Context())
	require.NoError(t, err)
	assert.Equal(t, old+"-1", id)
	assert.Equal(t, old, snapshot.KeyOf(id))
	assert.Equal(t, id, r.pool.Status().Key)
	r.await(func(s Status) bool {
		for _, v := range r.pool.List() {
			if v.Snapshot != id || !v.Ready {
				return false
			}
		}
		return s.Ready == 2
	})
	vm := r.acquire("next")
	assert.Equal(t, Hit, vm.Outcome)
	assert.Equal(t, id, vm.Key())
	list := r.snapshots()
	require.Len(t, list, 2)
	assert.True(t, list[0].Current)
	assert.Equal(t, old, list[1].ID)
	assert.Equal(t, 1, list[1].Users)
	seen, alive := r.driver.Seen(pod.ID())
	assert.True(t, alive)
	assert.False(t, seen.Paused)

	// The next process knows which is which, and whose VM uses the old one.
	r.restart(pod.Dir, vm.Dir)
	r.full(2)
	assert.Equal(t, id, r.pool.Status().Key)
	require.Len(t, r.snapshots(), 2)
	require.NoError(t, r.pool.Discard(t.Context(), pod))
	require.Eventually(t, func() bool { return len(r.snapshots()) == 1 }, soon, time.Millisecond)
	assert.Equal(t, id, r.snapshots()[0].ID)
	require.NoError(t, r.pool.Discard(t.Context(), vm))
}

// TestRebuildFails at each step: the old snapshot stays in use, and nothing is left.
func TestRebuildFails(t *testing.T) {
	r := newRig(t)
	r.full(2)
	old := r.pool.Status().Key
	// As many as before, or one more for those that were acquired.
	ready := func(s Status) bool { return s.Ready >= 2 && s.Making == 0 }
	for _, op := range []vmmtest.Op{vmmtest.OpBoot, vmmtest.OpPause, vmmtest.OpSnapshot, vmmtest.OpRestore} {
		r.driver.Fail(op, errTest)
		_, err := r.pool.Rebuild(t.Context())
		require.ErrorIs(t, err, errTest, op)
		r.driver.Fail(op, nil)
		assert.Equal(t, old, r.pool.Status().Key, op)
		r.eventually("VMs are ready", ready)
		vm := r.acquire("a")
		assert.Equal(t, Hit, vm.Outcome, op)
		require.NoError(t, r.pool.Discard(t.Context(), vm))
		r.eventually("VMs are ready", ready) // what fails next is the rebuilding, and no VM that is being made
	}
	entries, err := os.ReadDir(filepath.Join(r.dir, "snapshots"))
	require.NoError(t, err)
	assert.Len(t, entries, 1)
}

// TestRebuildWhilePodsStart rebuilds several times while pods come and the pool is
// filled: every pod has a VM, and in the end there is one snapshot.
func TestRebuildWhilePodsStart(t *testing.T) {
	r := newRig(t)
	r.full(2)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				vm, err := r.pool.Acquire(t.Context(), Request{Owner: "a"})
				if errors.Is(err, ErrNone) {
					assert.NoError(t, err)
					continue
				}
				assert.NoError(t, err)
				assert.NoError(t, r.pool.Discard(t.Context(), vm))
			}
		})
	}
	for range 5 {
		var builders sync.WaitGroup
		for range 3 {
			builders.Go(func() {
				_, err := r.pool.Rebuild(t.Context())
				assert.NoError(t, err)
			})
		}
		builders.Wait()
	}
	close(stop)
	wg.Wait()
	r.pool.Drain()
	r.await(empty)
	r.left(0)
	require.Eventually(t, func() bool { return len(r.snapshots()) == 1 }, soon, time.Millisecond)
	assert.True(t, r.snapshots()[0].Current)
	assert.Zero(t, r.snapshots()[0].Users)
}
