// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmpool

import (
	"time"

	"github.com/cloudhv/containerd-cloudhv/vmpool/snapshot"
)

// Gauges are the pool's figures at one moment.
type Gauges struct {
	// Ready VMs wait for a pod, Making are being made so.
	Ready, Making int
	// Target is how many should be ready, Max how many there may be.
	Target, Max int
	// MemoryBytes is what Ready and Making are reckoned to hold, MaxMemoryBytes its bound.
	MemoryBytes, MaxMemoryBytes int64
	// MemoryShort is true if the pool is smaller than it should be because the host is
	// short of memory.
	MemoryShort bool
	// Failures are those since something succeeded, Pause what is left of the pause
	// that they cost.
	Failures int
	Pause    time.Duration
	// Usable is true if there is a snapshot to restore from.
	Usable bool
	// Snapshots is what the snapshots take on disk.
	Snapshots snapshot.Usage
}

// Gauges looks how the pool is. Of one that is off all figures are zero.
func (p *Pool) Gauges() Gauges {
	if p.cfg.Off {
		return Gauges{}
	}
	_, err := p.cfg.Store.Peek(p.key)
	g := Gauges{
		Max: p.cfg.Demand.Max, MaxMemoryBytes: p.cfg.MaxMemory,
		Usable: err == nil, Snapshots: p.cfg.Store.Usage(p.key),
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	g.Ready, g.Making, g.Target, g.Failures = len(p.ready), p.making, p.target(), p.failures
	g.MemoryBytes = int64(g.Ready+g.Making) * p.cfg.VMMemory
	g.MemoryShort = p.pressure != plenty
	g.Pause = max(0, time.Until(p.until))
	return g
}
