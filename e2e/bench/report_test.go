// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"encoding/json"
	"errors"
	"testing"
	"time"

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
