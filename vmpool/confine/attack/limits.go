// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package attack

import (
	"os"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// group is a cgroup of this test's, or it is skipped.
func group(t *testing.T) string {
	t.Helper()
	parent := "/cloudhv-test-" + strconv.Itoa(os.Getpid())
	g := vmm.OpenCgroup(parent)
	if err := g.Make(); err != nil {
		t.Skipf("no cgroups: %v", err)
	}
	t.Cleanup(func() { require.NoError(t, g.Remove(Context(t))) })
	return parent + "/vmm"
}

// Multiplies has a VMM start processes without end, which end with it. It is started in a
// cgroup, and has so many threads at most beside those of vCPUs.
func Multiplies(t *testing.T, threads int, start func(group string) *VM) {
	g := group(t)
	v := start(g)
	results := v.Try(t, &Targets{Processes: 1000})
	require.NotNil(t, results)
	count, err := strconv.Atoi(results[resultProcesses])
	require.NoError(t, err)
	t.Logf("%d processes", count)
	require.Less(t, count, vmm.MaxVCPUs+threads)
	require.Positive(t, count)
	require.NoError(t, v.Kill(Context(t)))
	require.False(t, vmm.OpenCgroup(g).Exists(), "its processes are gone")
}

// TakesMemory has a VMM use more than its guest's size and the overhead, for which the
// kernel kills it, and another one no more than its guest's size.
func TakesMemory(t *testing.T, overhead int64, threads int, start func(group string) *VM) {
	g := group(t)
	v := start(g)
	bound := vmm.LimitsFor(v.Config.Size, overhead, threads).MemoryBytes
	require.Nil(t, v.Try(t, &Targets{MemoryBytes: int(bound + 64<<20)}), "it got more than its limit")
	<-v.Done()
	require.Contains(t, v.Exit().Cause, "killed by signal 9")
	require.False(t, v.Exit().Requested)

	within := start(g)
	require.NotNil(t, within.Try(t, &Targets{MemoryBytes: int(within.Config.Size.MemoryBytes)}), "its guest's memory it has")
}
