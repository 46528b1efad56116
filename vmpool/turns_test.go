// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmpool

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestTurns(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		turns := NewTurns()
		begin := time.Now()
		turns.Yield(t.Context())
		require.Zero(t, time.Since(begin), "nobody is there")

		first, second := turns.Begin(), turns.Begin()
		require.True(t, turns.Taken(t.Context()))
		yielded := make(chan time.Duration)
		go func() {
			turns.Yield(t.Context())
			yielded <- time.Since(begin)
		}()
		time.Sleep(time.Second)
		first()
		first() // counts once
		time.Sleep(time.Second / 2)
		second()
		require.Equal(t, 3*time.Second/2, <-yielded, "it waits for the last")

		begin = time.Now()
		done := turns.Begin()
		turns.Yield(t.Context())
		require.Equal(t, yieldLimit, time.Since(begin), "and not forever")
		done()

		taken := make(chan bool)
		go func() { taken <- turns.Taken(t.Context()) }()
		synctest.Wait()
		done = turns.Begin()
		require.True(t, <-taken)

		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		begin = time.Now()
		turns.Yield(ctx)
		require.False(t, turns.Taken(ctx))
		require.Zero(t, time.Since(begin))
		done()
	})
}
