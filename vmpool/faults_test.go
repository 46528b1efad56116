// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmpool

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/semaphore"

	"github.com/cloudhv/containerd-cloudhv/vmpool/snapshot"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmmtest"
)

// crowd is how many pods come at once.
const crowd = 100

// acquireAll lets a crowd come at once, each with so much time, and returns what
// became of them.
func (r *rig) acquireAll(limit time.Duration) (vms []*VM, errs []error) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range crowd {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(r.t.Context(), limit)
			defer cancel()
			vm, err := r.pool.Acquire(ctx, Request{Owner: "crowd"})
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				errs = append(errs, err)
				return
			}
			vm.Settled()
			vms = append(vms, vm)
		})
	}
	wg.Wait()
	return vms, errs
}

// TestDrainedCrowd lets a hundred pods wait for a pool that has nothing ready and
// restores two at a time: all come by a VM, no more than two at once.
func TestDrainedCrowd(t *testing.T) {
	r := newRig(t, func(c *Config) {
		c.Demand = Demand{Window: time.Second, Horizon: time.Minute}
		c.Slots = semaphore.NewWeighted(2)
	})
	r.eventually("the snapshot is made", func(s Status) bool { return s.Usable })
	var now, most atomic.Int32
	r.driver.FailFunc(vmmtest.OpRestore, func(string) error {
		n := now.Add(1)
		for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
		}
		time.Sleep(time.Millisecond)
		now.Add(-1)
		return nil
	})
	vms, errs := r.acquireAll(soon)
	require.Empty(t, errs)
	require.Len(t, vms, crowd)
	assert.EqualValues(t, 2, most.Load())
	assert.Equal(t, crowd, r.pool.Status().Outcomes[Miss])
	for _, vm := range vms {
		require.NoError(t, r.pool.Discard(t.Context(), vm))
	}
	r.left(0)
}

// TestCrowdWithoutTime lets restores hang while a hundred pods wait: each gives up
// when its time is over and knows what for, nothing is left of any, the snapshot is
// not blamed, and later pods are served.
func TestCrowdWithoutTime(t *testing.T) {
	r := newRig(t, func(c *Config) {
		c.Demand = Demand{Window: time.Second, Horizon: time.Minute}
		c.Slots = semaphore.NewWeighted(2)
	})
	r.eventually("the snapshot is made", func(s Status) bool { return s.Usable })
	before, err := r.store.List()
	require.NoError(t, err)
	r.driver.Hang(vmmtest.OpRestore)
	began := time.Now()
	vms, errs := r.acquireAll(200 * time.Millisecond)
	assert.Less(t, time.Since(began), soon)
	assert.Empty(t, vms)
	require.Len(t, errs, crowd)
	for _, err := range errs {
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.NotErrorIs(t, err, ErrNone, "it has no time to boot either")
	}
	r.left(0)
	r.driver.Fail(vmmtest.OpRestore, nil)
	r.eventually("there is a snapshot", func(s Status) bool { return s.Usable })
	vm := r.acquire("late")
	assert.Equal(t, Miss, vm.Outcome)
	require.NoError(t, r.pool.Discard(t.Context(), vm))
	assert.Equal(t, crowd, r.pool.Status().Outcomes[Failed])
	after, err := r.store.List()
	require.NoError(t, err)
	assert.Equal(t, before, after)
}

// TestHangingRestore lets restores hang while pods have time: they are told to boot,
// and the snapshot is blamed.
func TestHangingRestore(t *testing.T) {
	r := newRig(t, func(c *Config) {
		c.Demand = Demand{Window: time.Second, Horizon: time.Minute}
		c.ReadyLimit = 90 * time.Millisecond
	})
	r.eventually("the snapshot is made", func(s Status) bool { return s.Usable })
	r.driver.Hang(vmmtest.OpRestore)
	for range badSnapshot {
		_, err := r.pool.Acquire(t.Context(), Request{Owner: "a"})
		require.ErrorIs(t, err, ErrNone)
		require.ErrorIs(t, err, context.DeadlineExceeded)
	}
	list, err := r.store.List()
	require.NoError(t, err)
	assert.True(t, slices.ContainsFunc(list, func(i snapshot.Info) bool { return i.Damaged }))
	r.driver.Fail(vmmtest.OpRestore, nil)
	r.eventually("another is made", func(s Status) bool { return s.Usable })
	r.left(0)
}

// TestTemplateDies kills the template while its guest is being asked: pods boot, the
// pool says why, and makes another after a pause.
func TestTemplateDies(t *testing.T) {
	r := newRig(t)
	r.full(2)
	r.pool.Drain()
	r.full(0)
	var deaths atomic.Int32
	die := func(id string) error {
		deaths.Add(1)
		r.driver.Die(id)
		return errTest
	}
	r.guest.ready.Store(&die)
	require.NoError(t, r.store.SetAside(r.pool.key))
	_, err := r.pool.Acquire(t.Context(), Request{Owner: "a"})
	require.ErrorIs(t, err, ErrNone)
	r.eventually("it pauses longer after a second time", func(Status) bool { return r.pool.Gauges().Failures >= 2 })
	assert.Greater(t, r.pool.Gauges().Pause, firstPause)
	assert.LessOrEqual(t, deaths.Load(), int32(3), "it does not spin")
	r.left(0)
	making, err := filepath.Glob(filepath.Join(r.dir, "snapshots", ".making-*"))
	require.NoError(t, err)
	assert.Empty(t, making)
	r.guest.ready.Store(nil)
	r.pool.Fill()
	r.full(2)
	assert.Zero(t, r.pool.Gauges().Failures)
}

// TestSilentGuests restores VMs whose agents do not answer: they are ended when their
// time is up, the snapshot is blamed after three, and all is well when they speak.
func TestSilentGuests(t *testing.T) {
	r := newRig(t, func(c *Config) { c.ReadyLimit = 30 * time.Millisecond })
	r.full(2)
	mute := func(string) error {
		time.Sleep(60 * time.Millisecond)
		return context.DeadlineExceeded
	}
	r.guest.ready.Store(&mute)
	vms := []*VM{r.acquire("a"), r.acquire("b")}
	r.eventually("the snapshot is set aside", func(Status) bool {
		list, err := r.store.List()
		return err == nil && slices.ContainsFunc(list, func(i snapshot.Info) bool { return i.Damaged })
	})
	for _, vm := range vms {
		require.NoError(t, r.pool.Discard(t.Context(), vm))
	}
	r.left(0)
	r.guest.ready.Store(nil)
	r.full(2)
}

// TestAlteredMemory changes the memory that ready VMs map: none of them is handed
// out, neither by this process nor by the next.
func TestAlteredMemory(t *testing.T) {
	for name, restart := range map[string]bool{"by this process": false, "by the next": true} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			r.full(2)
			old := r.driver.VMs()
			spoil := func() {
				path := filepath.Join(r.dir, "snapshots", r.pool.key, snapshot.MemoryFile)
				require.NoError(t, os.WriteFile(path, []byte("something else"), 0o600))
			}
			if restart {
				require.NoError(t, r.pool.Close())
				spoil()
				r.start(nil)
			} else {
				spoil()
				_, err := r.pool.Acquire(t.Context(), Request{Owner: "a"})
				require.ErrorIs(t, err, ErrNone)
			}
			r.eventually("they are replaced", func(s Status) bool {
				return s.Ready == 2 && !slices.ContainsFunc(r.driver.VMs(), func(id string) bool { return slices.Contains(old, id) })
			})
			vm := r.acquire("b")
			assert.NotContains(t, old, vm.ID())
			require.NoError(t, r.pool.Discard(t.Context(), vm))
			r.full(2)
			r.left(2)
		})
	}
}

// TestDiscardFails lets the end of VMs fail that nobody has a hold of: those of a pool that is
// drained, and one that is found half made. It is tried again until nothing is left.
func TestDiscardFails(t *testing.T) {
	r := newRig(t)
	r.full(2)
	var fails atomic.Int32
	fails.Store(3)
	r.driver.FailFunc(vmmtest.OpKill, func(string) error {
		if fails.Add(-1) >= 0 {
			return errTest
		}
		return nil
	})
	r.pool.Drain()
	r.left(0)
	assert.Negative(t, fails.Load())
}
