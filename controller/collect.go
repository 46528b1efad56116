// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/cloudhv/containerd-cloudhv/vmpool"
)

// gauge describes a metric that is looked up when it is scraped, so that it is
// right after a restart too, and never of the past.
func gauge(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("containerd_cloudhv_"+name, help, labels, nil)
}

var (
	fitGauge       = gauge("fit", "1 if this node can serve sandboxes, and else 0.")
	sandboxesGauge = gauge("sandboxes", "Sandboxes, by state.", "state")
	vmsGauge       = gauge("vms", "VMs, by state: ready and being made in the pool, and of sandboxes.", "state")

	poolDepthGauge    = gauge("pool_depth", "VMs that are ready.")
	poolTargetGauge   = gauge("pool_target", "VMs that should be ready.")
	poolMaxGauge      = gauge("pool_max", "VMs that may be ready.")
	poolMemoryGauge   = gauge("pool_memory_bytes", "Memory that the pool's VMs are reckoned to hold.")
	poolMemMaxGauge   = gauge("pool_memory_max_bytes", "Memory that the pool's VMs may hold.")
	poolMemShortGauge = gauge("pool_memory_short", "1 if the pool does not grow because the host is short of memory, and else 0.")
	poolFailuresGauge = gauge("pool_consecutive_failures", "Failures of the refill since something succeeded.")
	poolPauseGauge    = gauge("pool_pause_seconds", "What is left of the pause that failures cost the refill.")
	poolUsableGauge   = gauge("pool_snapshot_usable", "1 if there is a snapshot to restore VMs from, and else 0.")
	snapshotGauge     = gauge("snapshot_bytes", "What snapshots take on disk, by kind.", "kind")
)

var _ prometheus.Collector = (*Controller)(nil)

// Describe implements prometheus.Collector.
func (c *Controller) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		fitGauge, sandboxesGauge, vmsGauge, poolDepthGauge, poolTargetGauge, poolMaxGauge, poolMemoryGauge,
		poolMemMaxGauge, poolMemShortGauge, poolFailuresGauge, poolPauseGauge, poolUsableGauge, snapshotGauge,
	} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *Controller) Collect(ch chan<- prometheus.Metric) {
	send := func(d *prometheus.Desc, value float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	}
	send(fitGauge, boolValue(c.unfit == nil))
	states, vms := map[State]int{}, 0
	for _, p := range c.allPods() {
		rec := p.snapshot()
		states[rec.State]++
		if rec.VM != nil && rec.State != StateStopped {
			vms++
		}
	}
	for state := range transitions {
		send(sandboxesGauge, float64(states[state]), string(state))
	}
	var g vmpool.Gauges
	if c.pool != nil {
		g = c.pool.Gauges()
	}
	for state, n := range map[string]int{"ready": g.Ready, "making": g.Making, "sandbox": vms} {
		send(vmsGauge, float64(n), state)
	}
	send(poolDepthGauge, float64(g.Ready))
	send(poolTargetGauge, float64(g.Target))
	send(poolMaxGauge, float64(g.Max))
	send(poolMemoryGauge, float64(g.MemoryBytes))
	send(poolMemMaxGauge, float64(g.MaxMemoryBytes))
	send(poolMemShortGauge, boolValue(g.MemoryShort))
	send(poolFailuresGauge, float64(g.Failures))
	send(poolPauseGauge, g.Pause.Seconds())
	send(poolUsableGauge, boolValue(g.Usable))
	for kind, n := range map[string]int64{
		"current": g.Snapshots.Current, "older": g.Snapshots.Older, "damaged": g.Snapshots.Damaged, "making": g.Snapshots.Making,
	} {
		send(snapshotGauge, float64(n), kind)
	}
}

func boolValue(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
