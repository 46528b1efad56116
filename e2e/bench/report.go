// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// Names of what is measured.
const (
	runPodSandbox = "run_pod_sandbox"
	firstWrite    = "first_write"
	execTrue      = "exec"
	stopRemove    = "stop_remove"
	vmmPrivate    = "vmm_private_bytes"
	shimPrivate   = "shim_private_bytes"
)

var names = []string{runPodSandbox, firstWrite, execTrue, stopRemove, vmmPrivate, shimPrivate}

// Units of the results.
const (
	unitMillis = "ms"
	unitBytes  = "bytes"
)

// wanted is how many values of each name a pod of h gives when nothing fails.
func wanted(name, h string) int {
	switch {
	case name == execTrue:
		return execs
	case name == vmmPrivate && h == testnode.RunC:
		return 0
	}
	return 1
}

func unit(name string) string {
	if name == vmmPrivate || name == shimPrivate {
		return unitBytes
	}
	return unitMillis
}

// sample is what has been measured of one thing by one handler.
type sample struct {
	values []float64
	failed int
}

// bench collects measurements.
type bench struct {
	node *testnode.Node
	// samples are by name and handler, see key.
	samples map[string]*sample
	// startPhases are those of each start by our handler, calls those of CRI.
	startPhases [][]phase
	calls       [][]phase
	machine     string
}

// mark is a part of a start as its caller sees it.
type mark struct {
	name       string
	begin, end time.Time
}

func key(name, h string) string { return name + " " + h }

func (b *bench) reset() {
	b.samples = map[string]*sample{}
	b.startPhases, b.calls = nil, nil
}

// add notes a value, or that there is none because of err.
func (b *bench) add(name, h string, value float64, err error) {
	s := b.samples[key(name, h)]
	if s == nil {
		s = &sample{}
		b.samples[key(name, h)] = s
	}
	if err != nil {
		s.failed++
		return
	}
	s.values = append(s.values, value)
}

// tried is how many values and failures of each name there are by now.
func (b *bench) tried(h string) map[string]int {
	m := map[string]int{}
	for _, name := range names {
		if s := b.samples[key(name, h)]; s != nil {
			m[name] = len(s.values) + s.failed
		}
	}
	return m
}

// errNotReached stands for what was not even tried.
var errNotReached = fmt.Errorf("an earlier step failed: %w", errdefs.ErrAborted)

// settle counts as failed what a pod, begun when tried was before, has not given.
func (b *bench) settle(h string, before map[string]int) {
	now := b.tried(h)
	for _, name := range names {
		for range wanted(name, h) - (now[name] - before[name]) {
			b.add(name, h, 0, errNotReached)
		}
	}
}

func (b *bench) duration(name, h string, d time.Duration, err error) {
	b.add(name, h, float64(d.Microseconds())/1000, err)
}

func (b *bench) parts(start time.Time, marks []mark) {
	var ps []phase
	for _, m := range marks {
		ps = append(ps, phase{Name: m.name, AtUsec: m.begin.Sub(start).Microseconds(), TookUsec: m.end.Sub(m.begin).Microseconds()})
	}
	b.calls = append(b.calls, ps)
}

func (b *bench) failed() int {
	sum := 0
	for _, s := range b.samples {
		sum += s.failed
	}
	return sum
}

// stats sums up a sample: how many values, how many that should be there and are
// not (failed), and percentiles. N and Failed together are what was planned.
type stats struct {
	N      int     `json:"n"`
	Failed int     `json:"failed"`
	P50    float64 `json:"p50"`
	P95    float64 `json:"p95"`
	P99    float64 `json:"p99"`
}

// result compares one thing. Ratio is ours over runc's at p50, null where one
// of them is missing.
type result struct {
	Name  string   `json:"name"`
	Unit  string   `json:"unit"`
	Ours  stats    `json:"ours"`
	RunC  stats    `json:"runc"`
	Ratio *float64 `json:"ratio"`
}

func (b *bench) results() []result {
	rs := make([]result, 0, len(names))
	for _, name := range names {
		r := result{Name: name, Unit: unit(name), Ours: b.samples[key(name, testnode.CloudHV)].sum(), RunC: b.samples[key(name, testnode.RunC)].sum()}
		if r.Ours.N > 0 && r.RunC.P50 > 0 {
			ratio := math.Round(r.Ours.P50/r.RunC.P50*1000) / 1000
			r.Ratio = &ratio
		}
		rs = append(rs, r)
	}
	return rs
}

func (s *sample) sum() stats {
	if s == nil {
		return stats{}
	}
	return stats{N: len(s.values), Failed: s.failed, P50: percentile(s.values, 50), P95: percentile(s.values, 95), P99: percentile(s.values, 99)}
}

// percentile is the smallest value that p percent of all do not exceed; 0 of nothing.
func percentile(values []float64, p float64) float64 {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	return sorted[max(int(math.Ceil(p/100*float64(len(sorted))))-1, 0)]
}

func printResults(w io.Writer, rs []result) {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tw, "\tunit\tours p50\tp95\tp99\tn\tfailed\trunc p50\tp95\tp99\tn\tfailed\tratio\t")
	for _, r := range rs {
		unit, scale := r.Unit, 1.0
		if unit == unitBytes {
			unit, scale = "MiB", 1<<20
		}
		ratio := "-"
		if r.Ratio != nil {
			ratio = fmt.Sprintf("%.2f", *r.Ratio)
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t\n", r.Name, unit, r.Ours.columns(scale), r.RunC.columns(scale), ratio)
	}
	tw.Flush()
}

func (s stats) columns(scale float64) string {
	return fmt.Sprintf("%.1f\t%.1f\t%.1f\t%d\t%d", s.P50/scale, s.P95/scale, s.P99/scale, s.N, s.Failed)
}

// printPhases prints where the time of our starts goes: medians of when each
// part begins and how long it takes. Parts may overlap.
func (b *bench) printPhases(w io.Writer) {
	fmt.Fprintf(w, "\nWhere a start's time goes (ours, medians of %d; %s)\n", len(b.calls), b.machine)
	fmt.Fprintln(w, "As the caller sees it, since RunPodSandbox:")
	printMedians(w, b.calls)
	fmt.Fprintln(w, "Within RunPodSandbox, in the controller, since its Start:")
	printMedians(w, b.startPhases)
}

func printMedians(w io.Writer, starts [][]phase) {
	at, took := map[string][]float64{}, map[string][]float64{}
	var order []string
	for _, ps := range starts {
		for _, p := range ps {
			if at[p.Name] == nil {
				order = append(order, p.Name)
			}
			at[p.Name] = append(at[p.Name], float64(p.AtUsec)/1000)
			took[p.Name] = append(took[p.Name], float64(p.TookUsec)/1000)
		}
	}
	slices.SortStableFunc(order, func(a, b string) int {
		return int(percentile(at[a], 50)*1000 - percentile(at[b], 50)*1000)
	})
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, name := range order {
		fmt.Fprintf(tw, "  %s\tat %.1f ms\ttakes %.1f ms\tp95 %.1f ms\n", name, percentile(at[name], 50), percentile(took[name], 50), percentile(took[name], 95))
	}
	tw.Flush()
}
