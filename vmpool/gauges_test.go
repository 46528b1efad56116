// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmpool

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
)

// TestGauges follows the pool from a failure to a full pool and a damaged snapshot.
func TestGauges(t *testing.T) {
	fail := func(string) error { return errTest }
	r := newRig(t, func(c *Config) {
		c.MaxMemory, c.VMMemory = 100<<20, 10<<20
		g, _ := c.Guest.(*fakeGuest)
		g.ready.Store(&fail)
	})
	require.Eventually(t, func() bool { return r.pool.Gauges().Failures > 0 }, soon, time.Millisecond)
	g := r.pool.Gauges()
	assert.Positive(t, g.Pause)
	assert.LessOrEqual(t, g.Pause, longestPause)
	assert.False(t, g.Usable)
	assert.Zero(t, g.Snapshots.Current)
	assert.Equal(t, 2, g.Target)

	r.guest.ready.Store(nil)
	r.full(2)
	g = r.pool.Gauges()
	snapshots := g.Snapshots
	g.Snapshots.Current = 0
	assert.Equal(t, Gauges{Ready: 2, Target: 2, Max: 8, MemoryBytes: 20 << 20, MaxMemoryBytes: 100 << 20, Usable: true}, g)
	assert.Positive(t, snapshots.Current)

	r.restart()
	r.full(2)
	assert.Equal(t, snapshots, r.pool.Gauges().Snapshots, "the same after a restart")
	require.NoError(t, os.Mkdir(filepath.Join(r.dir, "snapshots", ".making-test"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(r.dir, "snapshots", ".making-test", "memory"), make([]byte, 64<<10), 0o600))
	require.NoError(t, r.pool.Close()) // it would see that, and make another one
	require.NoError(t, r.store.SetAside(r.pool.key))
	g = r.pool.Gauges()
	assert.False(t, g.Usable)
	assert.Equal(t, snapshots.Current, g.Snapshots.Damaged)
	assert.EqualValues(t, 64<<10, g.Snapshots.Making)
}

// TestTraces: what the pool does by itself is a trace of its own, and an acquire is
// part of its caller's.
func TestTraces(t *testing.T) {
	rec := tracetest.NewSpanRecorder()
	old := otel.GetTracerProvider()
	otel.SetTracerProvider(trace.NewTracerProvider(trace.WithSpanProcessor(rec)))
	t.Cleanup(func() { otel.SetTracerProvider(old) })
	r := newRig(t, func(c *Config) { c.Demand.Min, c.Demand.Max = 1, 1 })
	r.full(1)
	ctx, caller := otel.Tracer("").Start(t.Context(), "caller")
	vm, err := r.pool.Acquire(ctx, Request{Owner: "a"})
	require.NoError(t, err)
	caller.End()
	defer func() { require.NoError(t, r.pool.Discard(t.Context(), vm)) }()

	names := map[string]string{}
	for _, s := range rec.Ended() {
		names[s.SpanContext().SpanID().String()] = s.Name()
	}
	const prefix = "cloudhv.pool."
	seen := map[[2]string]bool{}
	for _, s := range rec.Ended() {
		seen[[2]string{s.Name(), names[s.Parent().SpanID().String()]}] = true
		if s.Name() == prefix+"acquire" {
			assert.Contains(t, s.Attributes(), attribute.String("outcome", "hit"))
		}
	}
	for _, want := range [][2]string{
		{prefix + "snapshot", ""}, {prefix + "boot", prefix + "snapshot"}, {prefix + "save", prefix + "snapshot"},
		{prefix + "restore", prefix + "snapshot"}, {prefix + "refill", ""}, {prefix + "restore", prefix + "refill"},
		{prefix + "answer", prefix + "refill"}, {prefix + "warm_up", prefix + "refill"},
		{prefix + "acquire", "caller"}, {prefix + "hand_over", prefix + "acquire"},
	} {
		assert.True(t, seen[want], "%v in %v", want, seen)
	}
}
