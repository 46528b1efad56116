// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// phase is a part of the controller's Start.
type phase struct {
	Name     string `json:"name"`
	AtUsec   int64  `json:"at_usec"`
	TookUsec int64  `json:"took_usec"`
}

// mark is a part of a start as its caller sees it.
type mark struct {
	name       string
	begin, end time.Time
}

// parts turns marks into phases since start.
func parts(start time.Time, marks []mark) []phase {
	var ps []phase
	for _, m := range marks {
		ps = append(ps, phase{Name: m.name, AtUsec: m.begin.Sub(start).Microseconds(), TookUsec: m.end.Sub(m.begin).Microseconds()})
	}
	return ps
}

// find is the phase of this name; false if there is none.
func find(ps []phase, name string) (phase, bool) {
	i := slices.IndexFunc(ps, func(p phase) bool { return p.Name == name })
	if i < 0 {
		return phase{}, false
	}
	return ps[i], true
}

// ownTime is how long Create and Start took without the time in which the guest
// was waited for: its first answer, and its configuration.
func ownTime(create, start time.Duration, ps []phase) time.Duration {
	own := create + start
	for _, name := range []string{"check", "configure"} {
		p, _ := find(ps, name)
		own -= time.Duration(p.TookUsec) * time.Microsecond
	}
	return own
}

// answered is how long a restore took, from the first step for it to the guest's
// answer; false if the start was none.
func answered(ps []phase) (time.Duration, bool) {
	from, ok1 := find(ps, "acquire")
	to, ok2 := find(ps, "guest")
	return time.Duration(to.AtUsec+to.TookUsec-from.AtUsec) * time.Microsecond, ok1 && ok2
}

// Series of containerd's metrics that sum up how long things took, in seconds.
const (
	createSeries = "containerd_cloudhv_sandbox_create_seconds_sum"
	startSeries  = `containerd_cloudhv_sandbox_start_seconds_sum{outcome="hit"}`
)

// spent is how much a series of seconds has grown.
func spent(before, after map[string]float64, series string) time.Duration {
	return time.Duration((after[series] - before[series]) * float64(time.Second))
}

// labelled are the members of a metric of seconds that have grown, by their only label.
func labelled(before, after map[string]float64, metric string) []phase {
	var ps []phase
	for _, series := range slices.Sorted(maps.Keys(after)) {
		name, ok := strings.CutPrefix(series, "containerd_cloudhv_"+metric+"_seconds_sum{")
		if took := spent(before, after, series); ok && took > 0 {
			_, value, _ := strings.Cut(strings.TrimSuffix(name, "}"), "=")
			ps = append(ps, phase{Name: strings.Trim(value, `"`), TookUsec: took.Microseconds()})
		}
	}
	return ps
}

// What is printed of a container's start and of a pod's end, and where it is from.
var partsOf = []struct{ title, metric string }{
	{"Calls of the Task API, in the shim, in all", "task_call"},
	{"Parts of a container's creation, in the shim", "task_phase"},
	{"Parts of a pod's end, in the controller", "end_phase"},
}

// keepParts notes what a pod of its own has added to metrics.
func (r *report) keepParts(before, after map[string]float64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range partsOf {
		r.parts[p.title] = append(r.parts[p.title], labelled(before, after, p.metric))
	}
}

// printPhases prints where the time of our starts goes: medians of when each
// part begins and how long it takes. Parts may overlap.
func (r *report) printPhases(w io.Writer) {
	for _, outcome := range slices.Sorted(maps.Keys(r.calls)) {
		fmt.Fprintf(w, "\nWhere a start's time goes (ours, %s, medians of %d; %s)\n", outcome, len(r.calls[outcome]), r.machine)
		fmt.Fprintln(w, "As the caller sees it, since RunPodSandbox:")
		printMedians(w, r.calls[outcome])
		fmt.Fprintln(w, "Within RunPodSandbox, in the controller, since its Start:")
		printMedians(w, r.phases[outcome])
	}
	for _, p := range partsOf {
		if r.parts[p.title] != nil {
			fmt.Fprintf(w, "%s (of hits; when is not known):\n", p.title)
			printMedians(w, r.parts[p.title])
		}
	}
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
	slices.SortStableFunc(order, func(a, b string) int { return cmp.Compare(percentile(at[a], 50), percentile(at[b], 50)) })
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, name := range order {
		fmt.Fprintf(tw, "  %s\tat %.1f ms\ttakes %.1f ms\tp95 %.1f ms\n", name, percentile(at[name], 50), percentile(took[name], 50), percentile(took[name], 95))
	}
	tw.Flush()
}
