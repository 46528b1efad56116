// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/api/events"
	"github.com/containerd/typeurl/v2"
	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// near is by how much a figure may be off that is compared with another source, in percent.
const near = 5

// requireNear compares two figures; the second is what is right.
func requireNear(t *testing.T, got, want float64, what string) {
	t.Helper()
	require.InDelta(t, want, got, want*near/100, what)
}

// TestOOMOfOne has one of two containers take more memory than it may: that one is
// OOMKilled, one event tells so, and the other runs on.
func TestOOMOfOne(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		other := p.start(limited("other", 256*mib))
		other.awaitLine("ready")
		ctx, cancel := context.WithCancel(testContext(t))
		defer cancel()
		envelopes, errs := p.n.Containerd().EventService().Subscribe(ctx, `topic=="/tasks/oom"`)
		cfg := limited("greedy", 48*mib, "hold", strconv.Itoa(128*mib))
		greedy := p.start(cfg)
		st := greedy.awaitExit()
		require.Equal(t, "OOMKilled", st.GetReason())
		require.Equal(t, int32(137), st.GetExitCode())
		select {
		case e := <-envelopes:
			v, err := typeurl.UnmarshalAny(e.Event)
			require.NoError(t, err)
			require.Equal(t, greedy.id, v.(*events.TaskOOM).ContainerID)
		case err := <-errs:
			require.NoError(t, err)
		case <-time.After(testnode.Scale(20 * time.Second)):
			require.Fail(t, "no event tells of it")
		}
		// An exec that is killed for it leaves the container as it is.
		require.Equal(t, runtimeapi.ContainerState_CONTAINER_RUNNING, other.status().GetState())
		require.NoError(t, p.n.StopContainer(testContext(t), other.id, time.Minute))
		require.Equal(t, "Completed", other.status().GetReason())
	})
}

// limitCase is one limit of a container: its field, and what its cgroup says of it in
// both versions.
type limitCase struct {
	name   string
	set    func(*runtimeapi.LinuxContainerResources)
	v2, v1 string
	want   string
	want1  string
}

var limitCases = []limitCase{
	{"memory", func(r *runtimeapi.LinuxContainerResources) { r.MemoryLimitInBytes = 96 * mib }, "memory.max", "memory/memory.limit_in_bytes", "100663296", ""},
	{"CPU quota", func(r *runtimeapi.LinuxContainerResources) { r.CpuQuota, r.CpuPeriod = 40_000, 100_000 }, "cpu.max", "cpu/cpu.cfs_quota_us", "40000 100000", "40000"},
	{"CPU period", func(r *runtimeapi.LinuxContainerResources) { r.CpuQuota, r.CpuPeriod = 10_000, 50_000 }, "cpu.max", "cpu/cpu.cfs_period_us", "10000 50000", "50000"},
	{"CPU shares", func(r *runtimeapi.LinuxContainerResources) { r.CpuShares = 512 }, "cpu.weight", "cpu/cpu.shares", "20", "512"},
}

// value reads a limit's file in the container, by whichever version its cgroup has.
func (c *container) value(tc limitCase) (got, want string) {
	c.t.Helper()
	got = strings.TrimSpace(c.sh(fmt.Sprintf("cd /sys/fs/cgroup; cat %s 2>/dev/null || cat %s", tc.v2, tc.v1)))
	want = tc.want
	if tc.want1 != "" && c.sh("test -e /sys/fs/cgroup/cgroup.controllers && echo 2 || echo 1") == "1\n" {
		want = tc.want1
	}
	return got, want
}

// TestContainerLimits sets each limit at a container's creation, and on a running one.
func TestContainerLimits(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		bare := p.idle("bare")
		for i, tc := range limitCases {
			t.Run(tc.name, func(t *testing.T) {
				sub := *p
				sub.t = t
				cfg := idleConfig(fmt.Sprintf("c%d", i))
				tc.set(cfg.GetLinux().GetResources())
				got, want := sub.start(cfg).value(tc)
				require.Equal(t, want, got, "at its creation")
				r := &runtimeapi.LinuxContainerResources{}
				tc.set(r)
				_, err := p.n.Runtime().UpdateContainerResources(testContext(t), &runtimeapi.UpdateContainerResourcesRequest{ContainerId: bare.id, Linux: r})
				require.NoError(t, err)
				b := *bare
				b.pod = &sub
				got, want = b.value(tc)
				require.Equal(t, want, got, "after an update")
			})
		}
		// What CRI tells of them is what was asked for last.
		require.EqualValues(t, 96*mib, bare.status().GetResources().GetLinux().GetMemoryLimitInBytes())
		require.EqualValues(t, 512, bare.status().GetResources().GetLinux().GetCpuShares())
	})
}

// TestOOMScore checks that a container's score is what was asked for.
func TestOOMScore(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		cfg := idleConfig("c")
		cfg.Linux.Resources.OomScoreAdj = 901
		c := p.start(cfg)
		require.Equal(t, "901\n", c.sh("cat /proc/1/oom_score_adj"))
	})
}

// TestUnifiedLimits are keys of cgroup v2, such as the number of processes, at a
// container's creation and on a running one. The host's cgroups are version 1 where
// runc is not to be compared with.
func TestUnifiedLimits(t *testing.T) {
	requireCloudHV(t)
	p := newPod(t, testnode.CloudHV)
	cfg := shellConfig("c", "trap 'exit 0' TERM; while :; do sleep 1; done")
	cfg.Linux.Resources.Unified = map[string]string{"pids.max": "12", "memory.high": strconv.Itoa(64 * mib)}
	c := p.start(cfg)
	require.Equal(t, "12", c.cgroup("pids.max"))
	require.Equal(t, strconv.Itoa(64*mib), c.cgroup("memory.high"))
	require.Contains(t, c.sh("sh -c 'for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14; do sleep 5 & done' 2>&1 || true"), "fork")
	_, err := p.n.Runtime().UpdateContainerResources(testContext(t), &runtimeapi.UpdateContainerResourcesRequest{
		ContainerId: c.id, Linux: &runtimeapi.LinuxContainerResources{Unified: map[string]string{"pids.max": "200"}}})
	require.NoError(t, err)
	require.Equal(t, "200", c.cgroup("pids.max"))
}

// TestContainerStats compares CRI's figures of a busy container with its cgroup's.
func TestContainerStats(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		cfg := limited("memory", 256*mib, "hold", strconv.Itoa(96*mib))
		c := p.start(cfg)
		c.awaitLine("ok")
		busy := p.start(shellConfig("busy", "while :; do :; done"))
		idle := p.idle("idle")
		require.NotEmpty(t, idle.id)
		memory := func() *runtimeapi.MemoryUsage { return c.stats().GetMemory() }
		require.NoError(t, testnode.Eventually(testContext(t), func(context.Context) error {
			if b := memory().GetWorkingSetBytes().GetValue(); b < 90*mib {
				return fmt.Errorf("the working set has %d bytes", b)
			}
			return nil
		}))
		current := c.number("memory.current", "memory/memory.usage_in_bytes")
		requireNear(t, float64(memory().GetUsageBytes().GetValue()), current, "memory")
		requireNear(t, float64(memory().GetRssBytes().GetValue()), 96*mib, "anonymous memory")
		require.Positive(t, memory().GetPageFaults().GetValue())

		// Processor time goes on between two questions: what CRI says lies between
		// what the cgroup says before and after.
		time.Sleep(2 * time.Second) // so that there is something to measure
		before := busy.cpuNanos()
		var told uint64
		require.NoError(t, testnode.Eventually(testContext(t), func(context.Context) error {
			if told = busy.stats().GetCpu().GetUsageCoreNanoSeconds().GetValue(); float64(told) < before {
				return fmt.Errorf("the figure is of before: %d, want more than %f", told, before)
			}
			return nil
		}))
		after := busy.cpuNanos()
		require.GreaterOrEqual(t, float64(told), before*(100-near)/100)
		require.LessOrEqual(t, float64(told), after*(100+near)/100)
		if h == testnode.CloudHV {
			list, err := p.n.Runtime().ListContainerStats(testContext(t), &runtimeapi.ListContainerStatsRequest{Filter: &runtimeapi.ContainerStatsFilter{PodSandboxId: p.id}})
			require.NoError(t, err)
			require.Len(t, list.GetStats(), 3)
		}
	})
}

// stats are the container's figures by CRI.
// A guest that is busy has none for a moment: who asks, asks again.
func (c *container) stats() (stats *runtimeapi.ContainerStats) {
	c.t.Helper()
	require.NoError(c.t, testnode.Eventually(testContext(c.t), func(ctx context.Context) error {
		r, err := c.n.Runtime().ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: c.id})
		stats = r.GetStats()
		return err
	}))
	return stats
}

// number reads a number of the container's cgroup, of either version.
func (c *container) number(v2, v1 string) float64 {
	c.t.Helper()
	n, err := strconv.ParseFloat(strings.TrimSpace(c.sh(fmt.Sprintf("cd /sys/fs/cgroup; cat %s 2>/dev/null || cat %s", v2, v1))), 64)
	require.NoError(c.t, err)
	return n
}

// cpuNanos is the processor time that the container has used.
func (c *container) cpuNanos() float64 {
	c.t.Helper()
	return c.number("cpu.stat 2>/dev/null | awk '/^usage_usec/ { print $2 * 1000; ok = 1 } END { exit !ok }'", "cpuacct/cpuacct.usage")
}

// TestPodStats compares the pod's figures with its cgroup's on the host, in which the
// VMM and the shim are.
func TestPodStats(t *testing.T) {
	requireCloudHV(t)
	p := newPod(t, testnode.CloudHV)
	c := p.start(limited("memory", 256*mib, "hold", strconv.Itoa(96*mib)))
	c.awaitLine("ok")
	p.start(shellConfig("busy", "while :; do :; done"))
	time.Sleep(2 * time.Second) // so that there is something to measure
	before, _ := hostUsage(t, p)
	r, err := p.n.Runtime().PodSandboxStats(testContext(t), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: p.id})
	require.NoError(t, err)
	after, memory := hostUsage(t, p)
	linux := r.GetStats().GetLinux()
	cpu := float64(linux.GetCpu().GetUsageCoreNanoSeconds().GetValue())
	t.Logf("processor time: %.0f to %.0f, told %.0f", before, after, cpu)
	require.GreaterOrEqual(t, cpu, before*(100-near)/100)
	require.LessOrEqual(t, cpu, after*(100+near)/100)
	requireNear(t, float64(linux.GetMemory().GetUsageBytes().GetValue()), memory, "memory")
	require.Len(t, linux.GetContainers(), 2)
	require.GreaterOrEqual(t, linux.GetProcess().GetProcessCount().GetValue(), uint64(2))
	require.Equal(t, "eth0", linux.GetNetwork().GetDefaultInterface().GetName())
}

// hostUsage is what the host's cgroup of a pod has used: processor time in nanoseconds,
// and memory in bytes.
func hostUsage(t *testing.T, p *pod) (cpu, memory float64) {
	t.Helper()
	number := func(dir, file, key string) float64 {
		b, err := os.ReadFile(filepath.Join("/sys/fs/cgroup", dir, p.cfg.GetLinux().GetCgroupParent(), file))
		require.NoError(t, err)
		text := string(b)
		if key != "" {
			_, text, _ = strings.Cut(text, key+" ")
			text, _, _ = strings.Cut(text, "\n")
		}
		n, err := strconv.ParseFloat(strings.TrimSpace(text), 64)
		require.NoError(t, err)
		return n
	}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		return number("", "cpu.stat", "usage_usec") * 1000, number("", "memory.current", "")
	}
	return number("cpuacct", "cpuacct.usage", ""), number("memory", "memory.usage_in_bytes", "")
}

// TestWritableLayer compares what a container's writable layer takes by CRI with what
// du says inside.
func TestWritableLayer(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		c, other := p.idle("c"), p.idle("other")
		c.sh("mkdir /data && dd if=/dev/zero of=/data/big bs=1M count=40 2>/dev/null && for i in $(seq 100); do echo $i > /data/$i; done; sync")
		var used *runtimeapi.FilesystemUsage
		want, err := strconv.ParseFloat(strings.Fields(c.sh("du -sk /data"))[0], 64)
		require.NoError(t, err)
		require.NoError(t, testnode.Eventually(testContext(t), func(context.Context) error {
			// It may have been looked at while it was written.
			used = c.stats().GetWritableLayer()
			if float64(used.GetUsedBytes().GetValue()) < want*1024*(100-near)/100 || used.GetInodesUsed().GetValue() < 100 {
				return fmt.Errorf("the layer has %d bytes and %d inodes", used.GetUsedBytes().GetValue(), used.GetInodesUsed().GetValue())
			}
			return nil
		}))
		requireNear(t, float64(used.GetUsedBytes().GetValue()), want*1024, "bytes")
		require.InDelta(t, 102, used.GetInodesUsed().GetValue(), 30, "inodes, those of the mounts' places too")
		require.Less(t, other.stats().GetWritableLayer().GetUsedBytes().GetValue(), uint64(mib), "another container's")
	})
}
