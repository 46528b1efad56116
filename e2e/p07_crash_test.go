// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// TestVMMKilled is point 7's first case; runc has no such process.
func TestVMMKilled(t *testing.T) {
	requireCloudHV(t)
	p := newPod(t, testnode.CloudHV)
	running, ended, created := p.idle("running"), p.start(helperConfig("ended", "exit", "3")), p.create(idleConfig("created"))
	require.Equal(t, int32(3), ended.awaitExit().GetExitCode())
	require.NoError(t, testnode.Kill9(testContext(t), p.info().VMMPid))
	st := running.awaitExit()
	require.Equal(t, int32(137), st.GetExitCode())
	require.Equal(t, "Error", st.GetReason())
	require.Equal(t, int32(3), ended.status().GetExitCode(), "what was known stays known")
	p.awaitNotReady()
	require.Contains(t, p.info().Cause, "signal 9")
	requireInLog(t, p, "signal 9")
	_, _, _, err := p.n.ExecSync(testContext(t), running.id, "true")
	require.Error(t, err)
	require.Error(t, p.n.StartContainer(testContext(t), created.id))
	endsWell(t, p, running, created)
}

// TestShimKilled is the second case.
func TestShimKilled(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		c := p.idle("c")
		require.NoError(t, testnode.Kill9(testContext(t), p.shimPid()))
		st := c.awaitExit()
		require.Contains(t, []int32{137, 255}, st.GetExitCode())
		require.Equal(t, "Error", st.GetReason())
		p.awaitNotReady()
		if h == testnode.CloudHV {
			require.Contains(t, p.info().Cause, "shim")
			requireInLog(t, p, "shim")
		}
		endsWell(t, p, c)
	})
}

// requireInLog looks for a line of containerd's log above level info that names
// the pod and the cause.
func requireInLog(t *testing.T, p *pod, cause string) {
	t.Helper()
	log, err := os.ReadFile(p.n.LogPath())
	require.NoError(t, err)
	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, p.id) && strings.Contains(line, cause) && (strings.Contains(line, "level=error") || strings.Contains(line, "level=warning")) {
			return
		}
	}
	require.Fail(t, "the log does not name the cause", cause)
}

// endsWell checks that a broken pod can be stopped and removed, more than once,
// and that a new one starts.
func endsWell(t *testing.T, p *pod, cs ...*container) {
	t.Helper()
	ctx := testContext(t)
	for _, c := range cs {
		require.NoError(t, p.n.StopContainer(ctx, c.id, time.Second))
	}
	require.NoError(t, p.n.StopPod(ctx, p.id))
	for _, c := range cs {
		require.NoError(t, p.n.RemoveContainer(ctx, c.id))
	}
	require.NoError(t, p.n.StopPod(ctx, p.id))
	require.NoError(t, p.n.RemovePod(ctx, p.id))
	again := newPod(t, p.handler)
	again.idle("again").exec("true")
}

// TestFrozen is point 7's third case: a guest that stops answering. A VMM that is
// stopped is as silent as a guest can be; for runc it is the container's process.
// A stopped shim is no case: CRI's statistics wait for it without a limit, by
// runc's as by ours.
func TestFrozen(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		other, frozen := newPod(t, h), newPod(t, h)
		oc, fc := other.idle("other"), frozen.idle("frozen")
		pid := 0
		if h == testnode.CloudHV {
			pid = frozen.info().VMMPid
		} else {
			pid = fc.hostPid()
		}
		require.NoError(t, syscall.Kill(pid, syscall.SIGSTOP))
		t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGCONT) })
		since := time.Now()
		// A call that hangs in the frozen pod, as kubelet's probes would.
		hanging, cancel := context.WithCancel(testContext(t))
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _, _, _ = frozen.n.ExecSync(hanging, fc.id, "true")
		}()
		for range 5 {
			within(t, 5*time.Second, "another pod's exec", func() { oc.exec("true") })
		}
		within(t, 5*time.Second, "lists", func() { lists(t, other.n) })
		statsGoOn(t, other, oc, since)
		within(t, 60*time.Second, "a new pod", func() { newPod(t, h).idle("new").exec("true") })
		cancel()
		<-done
		within(t, 90*time.Second, "removing the frozen pod", func() {
			require.NoError(t, frozen.n.StopPod(testContext(t), frozen.id))
			require.NoError(t, frozen.n.RemovePod(testContext(t), frozen.id))
		})
	})
}

// hostPid is the process ID of a container that runs on the host.
func (c *container) hostPid() int {
	c.t.Helper()
	st, err := c.n.Runtime().ContainerStatus(testContext(c.t), &runtimeapi.ContainerStatusRequest{ContainerId: c.id, Verbose: true})
	require.NoError(c.t, err)
	var v struct {
		Pid int `json:"pid"`
	}
	require.NoError(c.t, json.Unmarshal([]byte(st.GetInfo()["info"]), &v))
	require.NotZero(c.t, v.Pid)
	return v.Pid
}

// within fails if f takes longer than d on a usual host.
func within(t *testing.T, d time.Duration, what string, f func()) {
	t.Helper()
	start := time.Now()
	f()
	took := time.Since(start)
	require.Less(t, took, testnode.Scale(d), what)
	t.Logf("%s: %s", what, took.Round(time.Millisecond))
}

func lists(t *testing.T, n *testnode.Node) {
	t.Helper()
	ctx := testContext(t)
	_, err := n.Runtime().ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	require.NoError(t, err)
	_, err = n.Runtime().ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	require.NoError(t, err)
	_, err = n.Runtime().ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{})
	require.NoError(t, err)
	_, err = n.Runtime().ListPodSandboxStats(ctx, &runtimeapi.ListPodSandboxStatsRequest{})
	require.NoError(t, err)
}

// statsGoOn waits until the statistics of a container and its pod are newer than
// some seconds after the given time.
func statsGoOn(t *testing.T, p *pod, c *container, since time.Time) {
	t.Helper()
	const age = 4 * time.Second
	ctx, cancel := context.WithTimeout(testContext(t), age+testnode.Scale(15*time.Second))
	defer cancel()
	start := time.Now()
	require.NoError(t, testnode.Eventually(ctx, func(ctx context.Context) error {
		cs, err := p.n.Runtime().ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{Filter: &runtimeapi.ContainerStatsFilter{Id: c.id}})
		if err != nil {
			return err
		}
		ps, err := p.n.Runtime().ListPodSandboxStats(ctx, &runtimeapi.ListPodSandboxStatsRequest{Filter: &runtimeapi.PodSandboxStatsFilter{Id: p.id}})
		if err != nil {
			return err
		}
		if len(cs.GetStats()) != 1 || len(ps.GetStats()) != 1 {
			return fmt.Errorf("%d and %d statistics, want one each", len(cs.GetStats()), len(ps.GetStats()))
		}
		for what, at := range map[string]int64{
			"container": cs.GetStats()[0].GetCpu().GetTimestamp(),
			"pod":       ps.GetStats()[0].GetLinux().GetCpu().GetTimestamp(),
		} {
			if got := time.Unix(0, at); got.Before(since.Add(age)) {
				return fmt.Errorf("the %s's statistics are from %s after the freeze", what, got.Sub(since))
			}
		}
		return nil
	}))
	t.Logf("statistics went on, seen after %s", time.Since(start).Round(time.Millisecond))
}
