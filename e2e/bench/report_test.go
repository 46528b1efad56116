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

func TestResults(t *testing.T) {
	b := &bench{samples: map[string]*sample{}}
	b.duration(runPodSandbox, testnode.CloudHV, 300*time.Millisecond, nil)
	b.duration(runPodSandbox, testnode.CloudHV, 0, errors.New("failed"))
	b.duration(runPodSandbox, testnode.RunC, 200*time.Millisecond, nil)
	b.add(vmmPrivate, testnode.CloudHV, 1<<20, nil)
	rs := b.results()
	require.Len(t, rs, len(names))
	data, err := json.Marshal(rs[0])
	require.NoError(t, err)
	require.JSONEq(t, `{"name":"run_pod_sandbox","unit":"ms","ours":{"n":1,"failed":1,"p50":300,"p95":300,"p99":300},
		"runc":{"n":1,"failed":0,"p50":200,"p95":200,"p99":200},"ratio":1.5}`, string(data))
	for _, r := range rs[1:] {
		require.Nil(t, r.Ratio, r.Name)
	}
	require.Equal(t, 1, b.failed())
}

// A pod that fails early has failed at all that was to come.
func TestWhatIsNotReachedHasFailed(t *testing.T) {
	b := &bench{samples: map[string]*sample{}}
	boom := errors.New("boom")
	for _, h := range handlers {
		// A good pod first, which must not make up for the bad ones.
		before := b.tried(h)
		for _, name := range names {
			for range wanted(name, h) {
				b.add(name, h, 1, nil)
			}
		}
		b.settle(h, before)
		// It does not start.
		before = b.tried(h)
		b.duration(runPodSandbox, h, time.Second, boom)
		b.settle(h, before)
		// One exec of it fails, and it cannot be inspected.
		before = b.tried(h)
		b.duration(runPodSandbox, h, time.Second, nil)
		b.duration(firstWrite, h, time.Second, nil)
		b.duration(execTrue, h, time.Second, nil)
		b.duration(execTrue, h, time.Second, boom)
		b.duration(execTrue, h, time.Second, nil)
		b.duration(stopRemove, h, time.Second, nil)
		b.settle(h, before)
	}
	failed := map[string][2]int{}
	for _, r := range b.results() {
		failed[r.Name] = [2]int{r.Ours.Failed, r.RunC.Failed}
		require.Equal(t, 3*wanted(r.Name, testnode.CloudHV), r.Ours.N+r.Ours.Failed, r.Name)
		require.Equal(t, 3*wanted(r.Name, testnode.RunC), r.RunC.N+r.RunC.Failed, r.Name)
	}
	require.Equal(t, map[string][2]int{
		runPodSandbox: {1, 1}, firstWrite: {1, 1}, execTrue: {execs + 1, execs + 1}, stopRemove: {1, 1},
		vmmPrivate: {2, 0}, shimPrivate: {2, 2},
	}, failed)
}

func TestTheShimOfNoPod(t *testing.T) {
	_, err := runcShim("no such pod")
	require.ErrorIs(t, err, errdefs.ErrNotFound)
}
