// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"errors"
	"time"

	"github.com/docker/go-metrics"

	shimapi "github.com/cloudhv/containerd-cloudhv/controller/shim"
	"github.com/cloudhv/containerd-cloudhv/vmpool"
)

// Metrics, served with containerd's own. Their names begin with
// containerd_cloudhv_; docs/metrics.md tells what each means. Those that count
// are here and in vmpool; what is true at the moment of the scrape is in
// collect.go. No label's values come from a guest or a pod.
var (
	createCounter  metrics.LabeledCounter
	createTimer    metrics.Timer
	startCounter   metrics.LabeledCounter
	endCounter     metrics.LabeledCounter
	recoverCounter metrics.LabeledCounter
	startTimer     metrics.LabeledTimer
	endTimer       metrics.Timer
	bootTimer      metrics.Timer
	rootfsTimer    metrics.Timer
	taskTimer      metrics.LabeledTimer
	taskCounter    metrics.LabeledCounter
	taskPartTimer  metrics.LabeledTimer
	clockCounter   metrics.LabeledCounter
)

// verb is what a stopwatch may be of, and where its phases are counted.
type verb struct {
	name     string
	phases   metrics.LabeledTimer
	failures metrics.LabeledCounter
}

// The verbs that have phases.
var startVerb, endVerb = &verb{name: "start"}, &verb{name: "end"}

// Values of labels. A metric has a value for each from the beginning, so that a
// first failure is an increase.
const (
	resultOK       = "ok"
	resultError    = "error"
	resultCanceled = "canceled"
	// outcomeNone is that of a start that failed before there was a VM.
	outcomeNone = "none"
)

var (
	startPhases = []string{
		"network", "acquire", "queue", "scratch", "boot", "shim", "guest", "join", "resize", "configure",
	}
	// checkPhase is a part of acquire. A start goes on without it, so it has no failures.
	checkPhase     = "check"
	endPhases      = []string{"power_off", "kill", "network", "files"}
	outcomes       = []string{string(vmpool.Hit), string(vmpool.Miss), string(vmpool.Cold)}
	endCauses      = []string{"stop", "start", "vm", "shim", "guest", "recovery"}
	recoverResults = []string{"ready", "pending", "stopped", "ended", "orphan", "removed", "damaged", "error"}
	taskCalls      = []string{"create", "start", "exec"}
	taskParts      = []string{shimapi.PartImage, shimapi.PartConnect, shimapi.PartStreams, shimapi.PartGuest}
)

func init() {
	ns := metrics.NewNamespace("containerd", "cloudhv", nil)
	timer := func(name, help, label string) metrics.LabeledTimer {
		return ns.NewLabeledTimerWithBuckets(name, help, vmpool.DurationBuckets, label)
	}
	createCounter = ns.NewLabeledCounter("sandbox_creates", "Sandboxes that were to be created, by result.", "result")
	createTimer = ns.NewTimerWithBuckets("sandbox_create", "Duration of a sandbox's creation, before its start.", vmpool.DurationBuckets)
	startCounter = ns.NewLabeledCounter("sandbox_starts", "Sandboxes that were to be started, by how they came by their VM and result.", "outcome", "result")
	startTimer = timer("sandbox_start", "Duration of a sandbox's successful start, by how it came by its VM.", "outcome")
	startVerb.phases = timer("start_phase", "Duration of the parts of a sandbox's start.", "phase")
	startVerb.failures = ns.NewLabeledCounter("start_phase_failures", "Parts of a sandbox's start that failed.", "phase")
	bootTimer = ns.NewTimerWithBuckets("boot", "Duration of a sandbox's VM's boot, until its guest answers.", vmpool.DurationBuckets)
	endCounter = ns.NewLabeledCounter("sandbox_ends", "Sandboxes that ended, by what ended them.", "cause")
	endTimer = ns.NewTimerWithBuckets("sandbox_end", "Duration of a sandbox's end.", vmpool.DurationBuckets)
	endVerb.phases = timer("end_phase", "Duration of the parts of a sandbox's end.", "phase")
	endVerb.failures = ns.NewLabeledCounter("end_phase_failures", "Parts of a sandbox's end that failed.", "phase")
	rootfsTimer = ns.NewTimerWithBuckets("attach_rootfs", "Duration of making an image a disk of a VM.", vmpool.DurationBuckets)
	taskTimer = timer("task_call", "Duration of the shims' successful calls of the Task API.", "call")
	taskCounter = ns.NewLabeledCounter("task_calls", "Calls of the Task API, by result.", "call", "result")
	taskPartTimer = timer("task_phase", "Duration of the parts of a container's creation, in the shim.", "phase")
	recoverCounter = ns.NewLabeledCounter("recovered_sandboxes", "Sandboxes found at the start, by what became of them.", "result")
	clockCounter = ns.NewLabeledCounter("clock_syncs", "Looks at guests' clocks, by what they led to.", "result")
	presetLabels()
	metrics.Register(ns)
}

// presetLabels makes the series that there can be.
func presetLabels() {
	counters := func(c metrics.LabeledCounter, values ...string) {
		for _, v := range values {
			c.WithValues(v).Inc(0)
		}
	}
	timers := func(t metrics.LabeledTimer, values ...string) {
		for _, v := range values {
			t.WithValues(v)
		}
	}
	counters(createCounter, resultOK, resultError)
	for _, outcome := range append([]string{outcomeNone}, outcomes...) {
		for _, result := range []string{resultOK, resultError, resultCanceled} {
			if outcome != outcomeNone || result != resultOK {
				startCounter.WithValues(outcome, result).Inc(0)
			}
		}
	}
	timers(startTimer, outcomes...)
	timers(startVerb.phases, startPhases...)
	timers(startVerb.phases, checkPhase)
	counters(startVerb.failures, startPhases...)
	counters(endCounter, endCauses...)
	timers(endVerb.phases, endPhases...)
	counters(endVerb.failures, endPhases...)
	timers(taskTimer, taskCalls...)
	for _, call := range taskCalls {
		taskCounter.WithValues(call, resultOK).Inc(0)
		taskCounter.WithValues(call, resultError).Inc(0)
	}
	timers(taskPartTimer, taskParts...)
	counters(recoverCounter, recoverResults...)
	counters(clockCounter, clockResults...)
}

func resultOf(err error) string {
	if err != nil {
		return resultError
	}
	return resultOK
}

// countCreate counts a creation that began at the time given.
func countCreate(began time.Time, err error) {
	createCounter.WithValues(resultOf(err)).Inc()
	if err == nil {
		createTimer.UpdateSince(began)
	}
}

// countStart counts a start that is over, by the record that it has led to.
func countStart(rec *record, watch *stopwatch, err error) {
	outcome, result := rec.outcome(), resultOf(err)
	if errors.Is(err, errStopped) || errors.Is(err, context.Canceled) {
		result = resultCanceled
	}
	startCounter.WithValues(outcome, result).Inc()
	if err == nil {
		startTimer.WithValues(outcome).Update(time.Since(watch.start))
	}
}

// outcome tells how a sandbox came by its VM.
func (r *record) outcome() string {
	switch {
	case r.VM == nil:
		return outcomeNone
	case r.Outcome == "":
		return string(vmpool.Cold)
	default:
		return r.Outcome
	}
}
