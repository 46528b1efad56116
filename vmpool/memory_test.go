// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmpool

import (
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestPressure(t *testing.T) {
	t.Parallel()
	for available, want := range map[int64]pressure{0: short, 49: short, 50: scarce, 99: scarce, 100: plenty, 1 << 40: plenty} {
		assert.Equal(t, want, pressureOf(available, 100), available)
	}
	assert.Equal(t, plenty, pressureOf(0, 0))
	n, err := HostMemory()
	require.NoError(t, err)
	assert.Positive(t, n)
}

// TestMemoryShort takes the host's memory away and gives it back: the pool stops to
// grow, shrinks, serves pods all the while, says why, and comes back.
func TestMemoryShort(t *testing.T) {
	var available atomic.Int64
	available.Store(99)
	r := newRig(t, func(c *Config) {
		c.Available, c.ReserveMemory = func() (int64, error) { return available.Load(), nil }, 100
	})
	r.eventually("it says why", func(s Status) bool { return s.Usable && errdefs.IsResourceExhausted(s.Err) })
	r.full(0)
	assert.True(t, r.pool.Gauges().MemoryShort)
	vm := r.acquire("a")
	assert.Equal(t, Miss, vm.Outcome, "a pod is not held up")

	available.Store(100)
	r.pool.poke()
	r.full(2)
	require.NoError(t, r.pool.Status().Err)
	assert.False(t, r.pool.Gauges().MemoryShort)

	available.Store(60) // scarce: what is ready stays
	r.pool.poke()
	r.eventually("it is seen", func(s Status) bool { return s.Err != nil })
	r.full(2)
	hit := r.acquire("b")
	assert.Equal(t, Hit, hit.Outcome)
	r.full(1)

	available.Store(49)
	r.pool.poke()
	r.full(0)
	require.NoError(t, r.pool.Discard(t.Context(), vm))
	require.NoError(t, r.pool.Discard(t.Context(), hit))
	r.left(0)
	available.Store(1000)
	r.pool.poke()
	r.full(2)
}
