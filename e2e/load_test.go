// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage/pattern"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

const (
	// askEach is how often something else is asked of the node that carries a load.
	askEach = 10 * time.Millisecond
	// loadRest is how long a node without a load is asked, for comparison.
	loadRest = 5 * time.Second
	// recoveryMargin is by how much the recovery of all pods may take longer than runc's.
	recoveryMargin = 3 * time.Second
	// statusSlack is what is granted to the p99 of a status, for chance.
	statusSlack = 50 * time.Millisecond
	// execsAtOnce and connectionsAtOnce are how many there are at a time, of all pods'.
	execsAtOnce, connectionsAtOnce = 20, 100
)

// load is what one handler has carried.
type load struct {
	t    *testing.T
	n    *testnode.Node
	h    string
	pods []*loadPod
	// recovery is how long containerd took until all pods were as before.
	recovery time.Duration
	// p99 is how long the node took to answer, by what it carried.
	p99 map[string]time.Duration
}

// loadPod is a pod under load, with a server in it.
type loadPod struct {
	*pod
	server *container
}

// TestLoad has each handler carry the same: many pods that start at once, a containerd that
// is killed below them, commands, output at full speed, connections, and the end of all at
// once. Nothing may fail. What else is asked of the node is answered meanwhile.
func TestLoad(t *testing.T) {
	carried := map[string]*load{}
	forHandlers(t, func(t *testing.T, h string) {
		l := &load{t: t, n: node(t), h: h, p99: map[string]time.Duration{}}
		carried[h] = l
		before, err := settled(testContext(t), l.n)
		require.NoError(t, err)
		l.during("rest", func() { time.Sleep(loadRest) })
		l.during("start", l.start)
		l.recover()
		l.during("exec", l.exec)
		l.during("logs", l.logs)
		l.during("forward", l.forward)
		l.during("end", l.end)
		// It is another containerd by now, whose files and goroutines are compared all the same.
		require.NoError(t, l.n.AwaitCensusOfAnyProcess(testContext(t), before))
	})
	ours, other := carried[testnode.CloudHV], carried[testnode.RunC]
	if ours == nil || other == nil || t.Failed() {
		return
	}
	assert.LessOrEqual(t, ours.recovery, other.recovery+testnode.Scale(recoveryMargin), "recovery of %d pods", count.loadPods)
	// A host with few processors has none to spare for the answer, whoever loads it: then the
	// worst that runc's pods do to it is the measure.
	most := 2*max(ours.p99["rest"], slices.Max(slices.Collect(maps.Values(other.p99)))) + testnode.Scale(statusSlack)
	for what, d := range ours.p99 {
		t.Logf("%-8s Status p99: runc %s, cloudhv %s; at rest %s, %s", what, other.p99[what], d, other.p99["rest"], ours.p99["rest"])
		assert.LessOrEqual(t, d, most, "CRI's Status, while the pods %s", what)
	}
}

// during does the work while CRI is asked for its status over and over.
func (l *load) during(what string, work func()) {
	l.t.Helper()
	took, d := l.asking(work)
	require.NotEmpty(l.t, took, "CRI's status during %s", what)
	slices.Sort(took)
	at := func(percent int) time.Duration { return took[(len(took)-1)*percent/100].Round(10 * time.Microsecond) }
	l.p99[what] = at(99)
	l.t.Logf("%-8s %s; Status %d times: median %s, p99 %s, at most %s", what, d.Round(time.Millisecond), len(took), at(50), at(99), at(100))
}

// asking asks for CRI's status until the work is done, also if that ends the test.
func (l *load) asking(work func()) (took []time.Duration, whole time.Duration) {
	ctx, done := context.WithCancel(context.Background())
	var asker sync.WaitGroup
	asker.Go(func() {
		tick := time.NewTicker(askEach)
		defer tick.Stop()
		for ctx.Err() == nil {
			asked, cancel := context.WithTimeout(context.WithoutCancel(ctx), testnode.Scale(testLimit))
			start := time.Now()
			_, err := l.n.Runtime().Status(asked, &runtimeapi.StatusRequest{})
			cancel()
			if !assert.NoError(l.t, err, "CRI's status") {
				return
			}
			took = append(took, time.Since(start))
			select {
			case <-ctx.Done():
			case <-tick.C:
			}
		}
	})
	start := time.Now()
	defer func() { // the work may end this goroutine
		done()
		asker.Wait()
	}()
	work()
	done()
	asker.Wait()
	return took, time.Since(start)
}

// each does something with every item of a number, so many at a time, and fails by the first
// few of the errors.
func (l *load) each(what string, n, atOnce int, do func(i int) error) {
	l.t.Helper()
	var wg sync.WaitGroup
	var mu sync.Mutex
	var errs []error
	next := make(chan int)
	for range min(n, atOnce) {
		wg.Go(func() {
			for i := range next {
				if err := do(i); err != nil {
					mu.Lock()
					errs = append(errs, fmt.Errorf("%d: %w", i, err))
					mu.Unlock()
				}
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
	if !assert.Empty(l.t, len(errs), "%s: so many of %d failed", what, n) {
		require.NoError(l.t, errors.Join(errs[:min(len(errs), 3)]...))
	}
}

// start has all pods start at once.
func (l *load) start() {
	l.pods = make([]*loadPod, count.loadPods)
	for i := range l.pods {
		cfg := podConfig(l.t)
		cfg.Metadata.Name = fmt.Sprint("load", i)
		l.pods[i] = &loadPod{pod: &pod{t: l.t, n: l.n, handler: l.h, cfg: cfg}}
	}
	l.t.Cleanup(func() {
		for _, p := range l.pods { // those that a failure has left
			if p.id != "" {
				p.remove()
			}
		}
	})
	l.each("pods", len(l.pods), len(l.pods), func(i int) (err error) {
		p := l.pods[i]
		if p.id, err = l.n.RunPod(testContext(l.t), p.cfg, l.h); err != nil {
			return err
		}
		p.server, err = p.begin(helperConfig("server", "serve", fmt.Sprint("127.0.0.1:", onV4)))
		return err
	})
	for _, p := range l.pods {
		p.server.awaitLine("listening")
	}
}

// begin makes and starts a container.
func (p *loadPod) begin(cfg *runtimeapi.ContainerConfig) (*container, error) {
	id, err := p.n.CreateContainer(testContext(p.t), p.pod.id, p.cfg, cfg)
	if err != nil {
		return nil, err
	}
	return &container{pod: p.pod, id: id, log: p.cfg.GetLogDirectory() + "/" + cfg.GetLogPath()}, p.n.StartContainer(testContext(p.t), id)
}

// recover has containerd killed, and come back.
func (l *load) recover() {
	require.NoError(l.t, l.n.Kill(testContext(l.t)))
	start := time.Now()
	require.NoError(l.t, l.n.Start(testContext(l.t)))
	if l.h == testnode.CloudHV {
		// CRI calls pods ready before the controller has asked after their VMs.
		for _, p := range l.pods {
			require.NoError(l.t, testnode.Eventually(testContext(l.t), func(context.Context) error {
				if state := p.info().State; state != "ready" {
					return fmt.Errorf("pod %.13s is %s", p.pod.id, state)
				}
				return nil
			}))
		}
	}
	l.recovery = time.Since(start)
	l.t.Logf("recovery %s", l.recovery.Round(time.Millisecond))
	pods, err := l.n.Runtime().ListPodSandbox(testContext(l.t), &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{
		State: &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY},
	}})
	require.NoError(l.t, err)
	require.Len(l.t, pods.GetItems(), len(l.pods), "pods that are ready")
	containers, err := l.n.Runtime().ListContainers(testContext(l.t), &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{
		State: &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING},
	}})
	require.NoError(l.t, err)
	require.Len(l.t, containers.GetContainers(), len(l.pods), "containers that run")
}

// exec runs commands in all pods in turn.
func (l *load) exec() {
	start := time.Now()
	l.each("commands", count.loadExecs, execsAtOnce, func(i int) error {
		want := fmt.Sprint("hello from ", i, "\n")
		out, errOut, code, err := l.n.ExecSync(testContext(l.t), l.pods[i%len(l.pods)].server.id, "echo", "hello", "from", strconv.Itoa(i))
		if err != nil || code != 0 || out != want || errOut != "" {
			return errors.Join(fmt.Errorf("exec answers %q, %q, %d", out, errOut, code), err)
		}
		return nil
	})
	assert.Less(l.t, time.Since(start), testnode.Scale(time.Minute), "%d commands", count.loadExecs)
}

// logs has containers write as fast as they can, and reads every byte of their logs.
func (l *load) logs() {
	writers := make([]*container, count.loadWriters)
	l.each("containers that write", len(writers), len(writers), func(i int) (err error) {
		writers[i], err = l.pods[i].begin(helperConfig("writer", "gen", strconv.FormatInt(count.loadBytes, 10), strconv.Itoa(i)))
		return err
	})
	for i, c := range writers {
		require.Zero(l.t, c.awaitExit().GetExitCode())
		var sum pattern.Checksum
		require.NoError(l.t, scanLog(c.log, func(line logLine) {
			if line.stream == "stdout" {
				_, _ = io.WriteString(&sum, line.text+"\n") // it cannot fail
			}
		}))
		require.Equal(l.t, pattern.Sum(uint64(i), count.loadBytes), sum.String(), "the log of %d", i)
		require.NoError(l.t, os.Remove(c.log)) // there are many
	}
}

// forward makes connections to one pod as kubectl does, all over one client's.
func (l *load) forward() {
	client := l.pods[0].forwarder(l.t)
	defer client.Close() //nolint:errcheck // it is used no more
	// A connection that stalls ends with the client's.
	limit := time.AfterFunc(testnode.Scale(testLimit), func() { _ = client.Close() })
	defer limit.Stop()
	l.each("connections", count.loadConnections, connectionsAtOnce, func(i int) error {
		s, err := client.open(onV4)
		if err != nil {
			return err
		}
		defer client.RemoveStreams(s.Stream, s.err)
		return errors.Join(pattern.RecvOn(s, 1000, uint64(i)), s.Close())
	})
}

// end removes all pods at once.
func (l *load) end() {
	l.each("pods", len(l.pods), len(l.pods), func(i int) error {
		err := errors.Join(l.n.StopPod(testContext(l.t), l.pods[i].id), l.n.RemovePod(testContext(l.t), l.pods[i].id))
		if err == nil {
			l.pods[i].id = ""
		}
		return err
	})
}
