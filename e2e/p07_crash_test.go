// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
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
	const cause = "the VM ended: the VMM was killed by signal 9"
	require.Contains(t, p.info().Cause, cause)
	requireInLog(t, p.n, p.id, cause)
	_, _, _, err := p.n.ExecSync(testContext(t), running.id, "true")
	require.Equal(t, notExecuted, class(err))
	require.Equal(t, notRunning, class(p.n.StartContainer(testContext(t), created.id)))
	endsWell(t, p, running, created)
}

// TestShimKilled is the second case.
func TestShimKilled(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		c := p.idle("c")
		pid := p.shimPid()
		require.NoError(t, testnode.Kill9(testContext(t), pid))
		st := c.awaitExit()
		require.Contains(t, []int32{137, 255}, st.GetExitCode())
		require.Equal(t, "Error", st.GetReason())
		p.awaitNotReady()
		if h == testnode.CloudHV {
			cause := fmt.Sprintf("the shim (pid %d) ended unexpectedly", pid)
			require.Equal(t, cause, p.info().Cause)
			requireInLog(t, p.n, p.id, cause)
		}
		endsWell(t, p, c)
	})
}

// requireInLog looks for a line of containerd's log above level info that names
// the pod or container and the cause.
func requireInLog(t *testing.T, n *testnode.Node, id, cause string) {
	t.Helper()
	log, err := os.ReadFile(n.LogPath())
	require.NoError(t, err)
	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, id) && strings.Contains(line, cause) && (strings.Contains(line, "level=error") || strings.Contains(line, "level=warning")) {
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

// silent is a pod that does not answer any more, and a container of it.
type silent struct {
	*pod
	c *container
}

// TestSilent is point 7's third case: guests that stop answering, one whose
// processors stand still under a VMM that lives, and one whose VMM is stopped,
// which is as silent as a guest can be. For runc it is the container's process. A
// stopped shim is no case: CRI's statistics wait for it without a limit, by runc's
// as by ours.
func TestSilent(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		other := newPod(t, h)
		oc := other.idle("other")
		frozen := newPod(t, h)
		pods := []silent{{frozen, frozen.idle("frozen")}}
		pid := 0
		if h == testnode.CloudHV {
			hung := newPod(t, h)
			pods = append(pods, silent{hung, hung.idle("hung")})
			hung.hang()
			pid = frozen.info().VMMPid
		} else {
			pid = pods[0].c.hostPid()
		}
		require.NoError(t, syscall.Kill(pid, syscall.SIGSTOP))
		t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGCONT) })
		since := time.Now()
		if h == testnode.RunC {
			othersGoOn(t, other, oc, since)
		} else {
			release := hangingCalls(t, pods)
			othersGoOn(t, other, oc, since)
			release()
		}
		ctx := testContext(t)
		gone := make(chan error, 1)
		within(t, 90*time.Second, "stopping and removing the frozen pod", func() {
			go func() { gone <- errors.Join(frozen.n.StopPod(ctx, frozen.id), frozen.n.RemovePod(ctx, frozen.id)) }()
			if h == testnode.CloudHV {
				hungIsEnded(t, pods[1])
			}
			require.NoError(t, <-gone)
		})
	})
}

// hangingCalls executes something in each pod, as kubelet's probes would, and
// returns a function that ends these calls, which must hang till then.
func hangingCalls(t *testing.T, pods []silent) (release func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(testContext(t))
	answers := make(chan error, len(pods))
	for _, s := range pods {
		go func() {
			_, _, _, err := s.n.ExecSync(ctx, s.c.id, "true")
			answers <- err
		}()
	}
	return func() {
		require.Empty(t, answers, "a silent pod has answered")
		cancel()
		for range pods {
			require.Equal(t, codes.Canceled, status.Code(errors.Unwrap(<-answers)))
		}
	}
}

// othersGoOn checks that another pod and the node are held up by nothing.
func othersGoOn(t *testing.T, other *pod, oc *container, since time.Time) {
	t.Helper()
	for range 5 {
		within(t, 5*time.Second, "another pod's exec", func() { oc.exec("true") })
	}
	within(t, 5*time.Second, "lists", func() { lists(t, other.n) })
	c := cli{t: t, n: other.n, ctx: testContext(t)}
	within(t, 15*time.Second, "crictl stats", func() {
		require.Contains(t, c.run("stats", "-o", "json"), oc.id)
		require.Contains(t, c.run("statsp", "-o", "json"), other.id)
	})
	statsGoOn(t, other, oc, since)
	within(t, 60*time.Second, "a new pod", func() { newPod(t, other.handler).idle("new").exec("true") })
}

// hungIsEnded ends a pod whose guest hangs, from the inside to the outside, and
// looks for the cause.
func hungIsEnded(t *testing.T, s silent) {
	t.Helper()
	pid := s.info().VMMPid
	require.NoError(t, syscall.Kill(pid, 0), "the VMM")
	within(t, 75*time.Second, "stopping the hung container", func() {
		require.NoError(t, s.n.StopContainer(testContext(t), s.c.id, time.Second))
	})
	st := s.c.status()
	require.Equal(t, int32(137), st.GetExitCode())
	require.Equal(t, "Error", st.GetReason())
	// The shim knows why; the log tells of the container and of the machine.
	shimLog, err := os.ReadFile(filepath.Join(s.n.StateDir(), s.id, "shim.log"))
	require.NoError(t, err)
	require.Contains(t, string(shimLog), "the guest has not answered for")
	requireInLog(t, s.n, s.c.id, "the guest does not answer")
	within(t, 60*time.Second, "stopping and removing the hung pod", func() {
		require.NoError(t, s.n.StopPod(testContext(t), s.id))
		s.awaitNotReady()
		require.Contains(t, s.info().Cause, "the guest has not answered for")
		require.NoError(t, s.n.RemovePod(testContext(t), s.id))
	})
	require.ErrorIs(t, syscall.Kill(pid, 0), syscall.ESRCH)
	requireInLog(t, s.n, s.id, "the guest was lost")
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
