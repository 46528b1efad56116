// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testnode

import (
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestParseMetrics(t *testing.T) {
	t.Parallel()
	got, err := parseMetrics(strings.NewReader(`# HELP a b
# TYPE a gauge
a 3
b_seconds_bucket{outcome="hit",le="+Inf"} 2
b_seconds_sum{outcome="hit"} 1.5e-3

c{x="a b"} NaN
`))
	require.NoError(t, err)
	require.InDelta(t, 3, got["a"], 0)
	require.InDelta(t, 2, got[`b_seconds_bucket{outcome="hit",le="+Inf"}`], 0)
	require.InDelta(t, 0.0015, got[`b_seconds_sum{outcome="hit"}`], 0)
	require.Contains(t, got, `c{x="a b"}`)
	_, err = parseMetrics(strings.NewReader("a three\n"))
	require.Error(t, err)
}

func TestHeapAlloc(t *testing.T) {
	t.Parallel()
	got, err := heapAlloc(strings.NewReader("heap profile: 1: 2 [3: 4] @ heap/1048576\n\n# runtime.MemStats\n# Alloc = 9\n# HeapAlloc = 123456\n"))
	require.NoError(t, err)
	require.Equal(t, int64(123456), got)
	_, err = heapAlloc(strings.NewReader("nothing\n"))
	require.Error(t, err)
}

func TestResidentBytes(t *testing.T) {
	t.Parallel()
	got, err := residentBytes(os.Getpid())
	require.NoError(t, err)
	require.Greater(t, got, int64(1<<20))
}
