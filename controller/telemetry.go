// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"github.com/docker/go-metrics"
)

// Metrics, served with containerd's own. Their names begin with
// containerd_cloudhv_.
var (
	createCounter  metrics.LabeledCounter
	startCounter   metrics.LabeledCounter
	endCounter     metrics.LabeledCounter
	startTimer     metrics.Timer
	stopTimer      metrics.Timer
	phaseTimer     metrics.LabeledTimer
	rootfsTimer    metrics.Timer
	sandboxesGauge metrics.Gauge
	recoverCounter metrics.LabeledCounter
)

func init() {
	ns := metrics.NewNamespace("containerd", "cloudhv", nil)
	createCounter = ns.NewLabeledCounter("sandbox_creates", "Sandboxes that were to be created, by result.", "result")
	startCounter = ns.NewLabeledCounter("sandbox_starts", "Sandboxes that were to be started, by result.", "result")
	endCounter = ns.NewLabeledCounter("sandbox_ends", "Sandboxes that ended, by what ended them.", "cause")
	startTimer = ns.NewTimer("sandbox_start", "Duration of a sandbox's successful start.")
	stopTimer = ns.NewTimer("sandbox_stop", "Duration of a sandbox's end.")
	phaseTimer = ns.NewLabeledTimer("start_phase", "Duration of the parts of a sandbox's start.", "phase")
	rootfsTimer = ns.NewTimer("attach_rootfs", "Duration of making an image a disk of a VM.")
	sandboxesGauge = ns.NewGauge("sandboxes", "Sandboxes that are ready.", metrics.Total)
	recoverCounter = ns.NewLabeledCounter("recovered_sandboxes", "Sandboxes found at the start, by what became of them.", "result")
	metrics.Register(ns)
}

func resultOf(err error) string {
	if err != nil {
		return "error"
	}
	return "ok"
}

func countCreate(err error) {
	createCounter.WithValues(resultOf(err)).Inc()
}
