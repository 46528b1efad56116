// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"encoding/json"
	"errors"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

func TestPercentile(t *testing.T) {
	var hundred []float64
	for i := range 100 {
		hundred = append(hundred, float64(100-i))
	}
	for _, tc := range []struct {
		values []float64
		p      float64
		want   float64
	}{
		{nil, 50, 0},
		{[]float64{7}, 99, 7},
		{[]float64{3, 1}, 50, 1},
		{hundred, 50, 50},
		{hundred, 95, 95},
		{hundred, 99, 99},
	} {
		require.InDelta(t, tc.want, percentile(tc.values, tc.p), 0, "%v of %v", tc.p, tc.values)
	}
}

func TestUnit(t *testing.T) {
	for name, want := range map[string]string{
		"first_write/hit@50":               unitMillis,
		"stop_remove":                      unitMillis,
		"first_write_p99_over_p50/hit@50":  unitRatio,
		"available_bytes_max_over_min":     unitRatio,
		"available_bytes_per_pod@150":      unitBytes,
		"vm_pss_bytes/not_warmed":          unitBytes,
		"idle_cpu_cores_per_pod":           unitCores,
		"containerd_goroutines_per_pod@10": unitCount,
		"pods_per_second/drained":          unitRate,
	} {
		require.Equal(t, want, unit(name), name)
	}
}

// jsonOf is the only result of this name, as it is written.
func jsonOf(t *testing.T, r *report, name string) string {
	t.Helper()
	found := ""
	for _, res := range r.results() {
		if res.Name == name {
			require.Empty(t, found, "twice: %s", name)
			data, err := json.Marshal(res)
			require.NoError(t, err)
			found = string(data)
		}
	}
	return found
}

func TestResults(t *testing.T) {
	r := newReport()
	r.duration(runPodSandbox, sideOurs, 300*time.Millisecond, nil)
	r.duration(runPodSandbox, sideOurs, 0, errors.New("failed"))
	r.duration(runPodSandbox, sideRunC, 200*time.Millisecond, nil)
	r.add(vmmPrivate, sideOurs, 1<<20, nil)
	r.duration(restoreToAnswer, sideOurs, 120*time.Millisecond, nil)
	r.duration(restoreToAnswer, sideBare, 100*time.Millisecond, nil)
	require.Len(t, r.results(), 3)
	require.JSONEq(t, `{"name":"run_pod_sandbox","unit":"ms","ours":{"n":1,"failed":1,"p50":300,"p95":300,"p99":300},
		"runc":{"n":1,"failed":0,"p50":200,"p95":200,"p99":200},"ratio":1.5}`, jsonOf(t, r, runPodSandbox))
	require.JSONEq(t, `{"name":"restore_to_answer","unit":"ms","ours":{"n":1,"failed":0,"p50":120,"p95":120,"p99":120},
		"bare":{"n":1,"failed":0,"p50":100,"p95":100,"p99":100},"ratio":1.2}`, jsonOf(t, r, restoreToAnswer))
	require.JSONEq(t, `{"name":"vmm_private_bytes","unit":"bytes","ours":{"n":1,"failed":0,"p50":1048576,"p95":1048576,"p99":1048576},
		"runc":{"n":0,"failed":0,"p50":0,"p95":0,"p99":0},"ratio":null}`, jsonOf(t, r, vmmPrivate))
	require.Equal(t, 1, r.failed())
}

// How our pods came by their VMs is nothing that runc has.
func TestPeers(t *testing.T) {
	r := newReport()
	for _, name := range []string{"a/hit", "a/miss", "a/drained", "a/hit@10"} {
		r.add(name, sideOurs, 8, nil)
	}
	r.add("a", sideRunC, 1, nil)
	r.add("a/drained", sideRunC, 2, nil)
	r.add("a@10", sideRunC, 4, nil)
	r.alias("a", "a/hit")
	r.alias("b", "no such result")
	got := map[string]float64{}
	for _, res := range r.results() {
		got[res.Name] = *res.Ratio
	}
	require.Equal(t, map[string]float64{"a/hit": 8, "a/miss": 8, "a/drained": 4, "a/hit@10": 2, "a": 8}, got)
}

func TestTails(t *testing.T) {
	r := newReport()
	for i := range 100 {
		r.add("a/hit@50", sideOurs, float64(i+1), nil)
		r.add("a@50", sideRunC, 10, nil)
	}
	r.tails("tail/hit@50", "a/hit@50")
	for _, res := range r.results() {
		if res.Name == "tail/hit@50" {
			require.InDelta(t, 99.0/50, res.Ours.P50, 1e-9)
			require.InDelta(t, 1, res.RunC.P50, 1e-9)
			require.InDelta(t, 1.98, *res.Ratio, 1e-9)
			return
		}
	}
	t.Fatal("no such result")
}

// A pod that fails early has failed at all that was to come.
func TestWhatIsNotReachedHasFailed(t *testing.T) {
	r := newReport()
	plan := map[string]int{runPodSandbox: 1, execTrue: execs, stopRemove: 1}
	good := r.expect(sideOurs, plan)
	good.duration(runPodSandbox, time.Second, nil)
	for range execs {
		good.duration(execTrue, time.Second, nil)
	}
	good.duration(stopRemove, time.Second, nil)
	good.settle()
	require.Zero(t, r.failed())

	half := r.expect(sideOurs, plan)
	half.duration(runPodSandbox, time.Second, nil)
	half.duration(execTrue, time.Second, errors.New("boom"))
	half.settle()
	half.settle()
	require.Equal(t, execs+1, r.failed())
	for _, res := range r.results() {
		require.Equal(t, 2*plan[res.Name], res.Ours.N+res.Ours.Failed, res.Name)
	}
}

func TestParts(t *testing.T) {
	ps := []phase{
		{"acquire", 100, 30_000}, {"check", 10_000, 20_000}, {"guest", 40_000, 60_000}, {"configure", 105_000, 25_000},
	}
	require.Equal(t, 10*time.Millisecond, ownTime(5*time.Millisecond, 50*time.Millisecond, ps))
	took, ok := answered(ps)
	require.True(t, ok)
	require.Equal(t, 99900*time.Microsecond, took)
	_, ok = answered(ps[:2])
	require.False(t, ok)
}

func TestLabelled(t *testing.T) {
	before := map[string]float64{`containerd_cloudhv_end_phase_seconds_sum{phase="kill"}`: 1, createSeries: 2}
	after := map[string]float64{
		`containerd_cloudhv_end_phase_seconds_sum{phase="kill"}`:   1.5,
		`containerd_cloudhv_end_phase_seconds_sum{phase="files"}`:  0,
		`containerd_cloudhv_end_phase_seconds_count{phase="kill"}`: 7,
		createSeries: 2.25,
	}
	require.Equal(t, []phase{{Name: "kill", TookUsec: 500_000}}, labelled(before, after, "end_phase"))
	require.Equal(t, 250*time.Millisecond, spent(before, after, createSeries))
}

func TestPerPod(t *testing.T) {
	empty := usage{available: 1000, ctrdCPU: 0.25, ctrd: testnode.Usage{Resident: 100, Heap: 50, Goroutines: 10, Files: 20}}
	full := usage{
		available: 800, vmm: 60, shim: 40, vmmCPU: 0.5, shimCPU: 0.25, ctrdCPU: 0.5,
		ctrd: testnode.Usage{Resident: 140, Heap: 70, Goroutines: 50, Files: 30},
	}
	require.Equal(t, map[string]float64{
		availablePerPod: 20, pssPerPod: 10, vmmPSSPerPod: 6, shimPSSPerPod: 4, residentPerPod: 4, heapPerPod: 2, goroutinesPerPod: 4,
		filesPerPod: 1, idlePerPod: 0.1, vmmIdlePerPod: 0.05, shimIdlePerPod: 0.025, ctrdIdlePerPod: 0.025,
	}, full.perPod(empty, 10))
}

func TestNumbers(t *testing.T) {
	got, err := numbers("1,10,50")
	require.NoError(t, err)
	require.Equal(t, []int{1, 10, 50}, got)
	for _, bad := range []string{"", "1,", "0", "x"} {
		_, err := numbers(bad)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, bad)
	}
}

func TestInTurn(t *testing.T) {
	require.Equal(t, []string{sideOurs, sideRunC, sideRunC, sideOurs}, new(bench).inTurn(2))
}
