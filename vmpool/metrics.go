// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmpool

import (
	"cmp"
	"maps"

	metrics "github.com/docker/go-metrics"
)

var (
	acquireCounter metrics.LabeledCounter
	failCounter    metrics.LabeledCounter
	badCounter     metrics.Counter
	drainedCounter metrics.Counter
	restoreTimer   metrics.Timer
	readyTimer     metrics.Timer
	snapshotTimer  metrics.Timer
)

// DurationBuckets are the upper bounds of histograms' buckets, in seconds: close
// where starts are, and up to those of a VM that boots in software emulation.
var DurationBuckets = []float64{
	.001, .002, .005, .01, .015, .02, .03, .05, .075, .1, .15, .2, .3, .5, 1, 2, 5, 10, 30, 60,
}

func init() {
	ns := metrics.NewNamespace("containerd_cloudhv", "pool", nil)
	acquireCounter = ns.NewLabeledCounter("acquire", "VMs that pods were given, by how: hit (was ready), miss (restored), cold (booted), failed", "outcome")
	failCounter = ns.NewLabeledCounter("failures", "What the pool failed to do, by step: snapshot, restore, ready", "step")
	badCounter = ns.NewCounter("bad", "Ready VMs that died or did not answer, and were ended")
	drainedCounter = ns.NewCounter("drained", "Pods that found no VM ready although the pool was to have some")
	restoreTimer = ns.NewTimerWithBuckets("restore", "Time to restore a VM until its guest runs", DurationBuckets)
	readyTimer = ns.NewTimerWithBuckets("ready", "Time to make a VM ready for the pool: restore, answer, warm-up", DurationBuckets)
	snapshotTimer = ns.NewTimerWithBuckets("snapshot", "Time to make a base snapshot", DurationBuckets)
	for _, outcome := range []Outcome{Hit, Miss, Cold, Failed} {
		acquireCounter.WithValues(string(outcome)).Inc(0)
	}
	for _, step := range []string{"snapshot", "restore", "ready"} {
		failCounter.WithValues(step).Inc(0)
	}
	metrics.Register(ns)
}

// Status is a picture of the pool.
type Status struct {
	// Off is true for a pool that has nothing to give; all else is zero then.
	Off bool
	// Key is the ID of the snapshot in use or, without one, what it will be made
	// for. Usable tells whether there is one.
	Key    string
	Usable bool
	// Ready, Making and Target count VMs; Ending are those that were ready and are
	// being ended.
	Ready, Making, Target, Ending int
	// Drained is true after Drain, until Fill.
	Drained bool
	// Outcomes counts what Acquire did since the start.
	Outcomes map[Outcome]int
	// Outran counts the pods among them that found none ready although there were to be
	// some: they came faster than the pool is filled, or it cannot be.
	Outran int
	// Failures are those of the refill since something succeeded. Err is the last
	// failure that nothing has made good since.
	Failures int
	Err      error
}

// Status tells how the pool is.
func (p *Pool) Status() Status {
	if p.cfg.Off {
		return Status{Off: true}
	}
	_, err := p.cfg.Store.Peek(p.key)
	key := cmp.Or(p.cfg.Store.Current(p.key), p.key)
	p.mu.Lock()
	defer p.mu.Unlock()
	s := Status{
		Key: key, Usable: err == nil, Ready: len(p.ready), Making: p.making, Target: p.target(), Ending: p.ending,
		Drained: p.drained, Outcomes: maps.Clone(p.outcomes), Outran: p.outran, Failures: p.failures, Err: p.lastErr,
	}
	if s.Err == nil {
		s.Err = p.memoryErr()
	}
	return s
}
