// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// Names of what is measured. "/hit" and the like, and "@N", come after them.
const (
	runPodSandbox   = "run_pod_sandbox"
	firstWrite      = "first_write"
	createStartOwn  = "create_start_own"
	execTrue        = "exec"
	stopRemove      = "stop_remove"
	vmmPrivate      = "vmm_private_bytes"
	shimPrivate     = "shim_private_bytes"
	podsPerSecond   = "pods_per_second"
	tail            = "first_write_p99_over_p50"
	restoreToAnswer = "restore_to_answer"
	vmPSS           = "vm_pss_bytes"
)

// Who is measured.
const (
	sideOurs = testnode.CloudHV
	sideRunC = testnode.RunC
	// sideBare is the hypervisor without anything of ours around it.
	sideBare = "bare"
)

// Units of the results.
const (
	unitMillis = "ms"
	unitBytes  = "bytes"
	unitCores  = "cores"
	unitRate   = "1/s"
	unitRatio  = "ratio"
	unitCount  = "count"
)

// unit is that of a name, with or without what comes after it.
func unit(name string) string {
	name, _, _ = strings.Cut(name, "/")
	name, _, _ = strings.Cut(name, "@")
	switch {
	case strings.Contains(name, "_over_"):
		return unitRatio
	case strings.Contains(name, "bytes"):
		return unitBytes
	case strings.Contains(name, "cores"):
		return unitCores
	case strings.HasSuffix(name, "_per_second"):
		return unitRate
	case strings.HasSuffix(name, "_per_pod"):
		return unitCount
	}
	return unitMillis
}

// sample is what has been measured of one thing by one side.
type sample struct {
	values []float64
	failed int
}

// key names a sample.
type key struct{ name, side string }

// report collects measurements. Its methods may be called concurrently.
type report struct {
	mu sync.Mutex
	// names are those of the results, in the order they first came.
	names   []string
	samples map[key]*sample
	// phases are those of each of our starts, by how it came by its VM; calls are
	// the same starts as CRI's client sees them.
	phases, calls map[string][][]phase
	// parts are of container starts and of ends, by what they are called.
	parts   map[string][][]phase
	machine string
	// notes are what a reader has to know of the run.
	notes []string
}

func newReport() *report {
	return &report{samples: map[key]*sample{}, phases: map[string][][]phase{}, calls: map[string][][]phase{}, parts: map[string][][]phase{}}
}

// add notes a value, or that there is none because of err.
func (r *report) add(name, side string, value float64, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if side == sideOurs && !slices.Contains(r.names, name) {
		r.names = append(r.names, name)
	}
	s := r.samples[key{name, side}]
	if s == nil {
		s = &sample{}
		r.samples[key{name, side}] = s
	}
	if err != nil {
		s.failed++
		return
	}
	s.values = append(s.values, value)
}

func (r *report) duration(name, side string, d time.Duration, err error) {
	r.add(name, side, float64(d.Microseconds())/1000, err)
}

// note adds a line that is printed with the results.
func (r *report) note(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.notes = append(r.notes, fmt.Sprintf(format, args...))
}

// errNotReached stands for what was not even tried.
var errNotReached = fmt.Errorf("an earlier step failed: %w", errdefs.ErrAborted)

// pending is what one pod, or one of whatever is measured repeatedly, has still to give.
type pending struct {
	r    *report
	side string
	// left are how many values of each name.
	left map[string]int
}

// expect says what is to come from side. What has not come by settle has failed.
func (r *report) expect(side string, names map[string]int) *pending {
	return &pending{r: r, side: side, left: maps.Clone(names)}
}

func (p *pending) add(name string, value float64, err error) {
	p.left[name]--
	p.r.add(name, p.side, value, err)
}

func (p *pending) duration(name string, d time.Duration, err error) {
	p.add(name, float64(d.Microseconds())/1000, err)
}

// settle counts as failed what has not come.
func (p *pending) settle() {
	for name, n := range p.left {
		for range n {
			p.r.add(name, p.side, 0, errNotReached)
		}
	}
	clear(p.left)
}

func (r *report) failed() int {
	sum := 0
	for _, s := range r.samples {
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

// result compares one thing. Ratio is ours over the peer's at p50, null where one
// of them is missing. The peer is runc, or else the bare hypervisor.
type result struct {
	Name  string   `json:"name"`
	Unit  string   `json:"unit"`
	Ours  stats    `json:"ours"`
	RunC  *stats   `json:"runc,omitempty"`
	Bare  *stats   `json:"bare,omitempty"`
	Ratio *float64 `json:"ratio"`
}

// peer is whom ours are compared with.
func (r *result) peer() *stats {
	if r.Bare != nil {
		return r.Bare
	}
	return r.RunC
}

func (r *report) results() []result {
	rs := make([]result, 0, len(r.names))
	for _, name := range r.names {
		res := result{Name: name, Unit: unit(name), Ours: r.samples[key{name, sideOurs}].sum()}
		if s := r.samples[key{name, sideBare}]; s != nil {
			sum := s.sum()
			res.Bare = &sum
		} else {
			sum := r.ofRunC(name).sum()
			res.RunC = &sum
		}
		if p := res.peer(); res.Ours.N > 0 && p.P50 > 0 {
			ratio := math.Round(res.Ours.P50/p.P50*1000) / 1000
			res.Ratio = &ratio
		}
		rs = append(rs, res)
	}
	return rs
}

// ofRunC is runc's sample for one of ours. How one of our pods came by its VM is
// nothing that runc has: "a/hit@10" is compared with its "a@10", unless it has one
// of that very name.
func (r *report) ofRunC(name string) *sample {
	if s := r.samples[key{name, sideRunC}]; s != nil {
		return s
	}
	base, rest, _ := strings.Cut(name, "/")
	if _, n, ok := strings.Cut(rest, "@"); ok {
		base += "@" + n
	}
	return r.samples[key{base, sideRunC}]
}

// alias gives a result a second name.
func (r *report) alias(name, of string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.samples[key{of, sideOurs}]
	if s == nil || slices.Contains(r.names, name) {
		return
	}
	r.names = append(r.names, name)
	r.samples[key{name, sideOurs}] = s
}

// namesOf are those of what a side has given, in order.
func (r *report) namesOf(side string) (names []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for k := range r.samples {
		if k.side == side {
			names = append(names, k.name)
		}
	}
	slices.Sort(names)
	return names
}

// tails adds how far the slowest of a result are from its middle, on each side.
func (r *report) tails(name, of string) {
	for side, s := range map[string]*sample{sideOurs: r.samples[key{of, sideOurs}], sideRunC: r.ofRunC(of)} {
		if sum := s.sum(); sum.P50 > 0 {
			r.add(name, side, sum.P99/sum.P50, nil)
		}
	}
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
	fmt.Fprintln(tw, "\tunit\tours p50\tp95\tp99\tn\tfailed\tpeer\tp50\tp95\tp99\tn\tfailed\tratio\t")
	for _, r := range rs {
		unit, scale := r.Unit, 1.0
		switch unit {
		case unitBytes:
			unit, scale = "MiB", 1<<20
		case unitCores:
			unit, scale = "m"+unitCores, 1e-3
		}
		peer, ratio := sideRunC, "-"
		if r.Bare != nil {
			peer = sideBare
		}
		if r.Ratio != nil {
			ratio = fmt.Sprintf("%.2f", *r.Ratio)
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\t\n", r.Name, unit, r.Ours.columns(scale), peer, r.peer().columns(scale), ratio)
	}
	tw.Flush()
}

func (s stats) columns(scale float64) string {
	return fmt.Sprintf("%.2f\t%.2f\t%.2f\t%d\t%d", s.P50/scale, s.P95/scale, s.P99/scale, s.N, s.Failed)
}
