// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"context"
	"fmt"
	"net"
	"testing"

	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// flowing is how many numbered lines flow while containerd restarts.
const flowing = 1500

// TestRestart is point 10.
func TestRestart(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		for name, kill := range map[string]bool{"stop": false, "kill": true} {
			t.Run(name, func(t *testing.T) { restart(t, h, kill) })
		}
	})
}

func restart(t *testing.T, h string, kill bool) {
	p := newPod(t, h)
	n := p.n
	lines := p.start(helperConfig("lines", "count", "0", fmt.Sprint(flowing), "2ms", "6"))
	idle := p.idle("idle")
	release := newLatch(t, n)
	meanwhile := p.start(helperConfig("meanwhile", "until", release.addr, "7"))
	conn := release.accept(t)
	created := p.create(idleConfig("created"))
	lines.awaitLine("line 50")
	ips := p.ips()
	var before info
	if h == testnode.CloudHV {
		before = p.info()
	}

	end := n.Stop
	if kill {
		end = n.Kill
	}
	require.NoError(t, end(testContext(t)))
	require.NoError(t, conn.Close()) // its container exits while nobody looks
	require.NoError(t, n.Start(testContext(t)))

	require.Equal(t, runtimeapi.PodSandboxState_SANDBOX_READY, p.state())
	require.Equal(t, ips, p.ips())
	st := meanwhile.awaitExit()
	if h == testnode.RunC && st.GetExitCode() == 255 {
		// containerd takes a container without processes for one whose shim is gone,
		// and then knows no exit code. Our shim still has it.
		t.Log("runc: the exit while containerd was away is told as 255")
	} else {
		require.Equal(t, int32(7), st.GetExitCode())
		require.Equal(t, "Error", st.GetReason())
		if !meanwhile.hasLineSoon("released") {
			// containerd deletes a task that it finds stopped, and may close its
			// output before it has read what the shim still keeps of it.
			t.Log("containerd dropped the tail of a container that ended while it was away")
		}
	}
	idle.exec("true")
	require.NoError(t, n.StartContainer(testContext(t), created.id))
	created.exec("true")
	p.idle("new").exec("true")
	if h == testnode.CloudHV {
		after := p.info()
		require.Equal(t, []int{before.VMMPid, before.ShimPid}, []int{after.VMMPid, after.ShimPid}, "the same processes")
	}
	require.Equal(t, int32(6), lines.awaitExit().GetExitCode())
	requireWhole(t, lines)
	require.NoError(t, n.StopContainer(testContext(t), idle.id, 0))
	newPod(t, h).idle("other").exec("true")
}

// requireWhole checks that the log has each line once, in order, on its stream.
func requireWhole(t *testing.T, c *container) {
	t.Helper()
	log, err := readLog(c.log)
	require.NoError(t, err)
	next := map[string]int{"stdout": 0, "stderr": 9}
	for _, l := range log {
		require.Equal(t, fmt.Sprint("line ", next[l.stream]), l.text, l.stream)
		switch {
		case l.stream == "stderr":
			next[l.stream] += 10
		case next[l.stream]%10 == 8:
			next[l.stream] += 2
		default:
			next[l.stream]++
		}
	}
	require.Equal(t, map[string]int{"stdout": flowing, "stderr": flowing + 9}, next)
}

// latch is a listener of the host; closing what it accepts releases a container.
type latch struct {
	l    net.Listener
	addr string
}

func newLatch(t *testing.T, n *testnode.Node) *latch {
	t.Helper()
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: n.HostIPs()[0].AsSlice()})
	require.NoError(t, err)
	t.Cleanup(func() { l.Close() })
	return &latch{l: l, addr: l.Addr().String()}
}

func (l *latch) accept(t *testing.T) net.Conn {
	t.Helper()
	conn := make(chan net.Conn, 1)
	go func() {
		defer close(conn)
		if c, err := l.l.Accept(); err == nil {
			conn <- c
		}
	}()
	select {
	case c := <-conn:
		require.NotNil(t, c)
		return c
	case <-testContext(t).Done():
		require.Fail(t, "nobody connects")
		return nil
	}
}

// TestRestartDied kills what a pod lives by while containerd is away.
func TestRestartDied(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		victims := map[string]func(*pod) int{"shim": (*pod).shimPid}
		if h == testnode.CloudHV {
			victims["machine"] = func(p *pod) int { return p.info().VMMPid }
		}
		for name, victim := range victims {
			t.Run(name, func(t *testing.T) {
				p := newPod(t, h)
				c := p.idle("c")
				pid := victim(p)
				require.NoError(t, p.n.Kill(testContext(t)))
				require.NoError(t, testnode.Kill9(testContext(t), pid))
				require.NoError(t, p.n.Start(testContext(t)))
				p.awaitNotReady()
				st := c.awaitExit()
				require.Contains(t, []int32{137, 255}, st.GetExitCode())
				if h == testnode.CloudHV {
					require.NotEmpty(t, p.info().Cause)
				}
				endsWell(t, p, c)
			})
		}
	})
}

// TestRestartDuringStart kills containerd in the middle of starts: afterwards
// whatever CRI lists can be removed, and nothing else is there. It is not for
// runc, of which containerd leaves a shim behind then.
func TestRestartDuringStart(t *testing.T) {
	requireCloudHV(t)
	n := node(t)
	before, err := settled(testContext(t), n)
	require.NoError(t, err)
	ctx := testContext(t)
	const pods = 3
	done := make(chan error, pods)
	for range pods {
		cfg := podConfig(t)
		go func() {
			id, err := n.RunPod(ctx, cfg, testnode.CloudHV)
			if err == nil {
				var c string
				if c, err = n.CreateContainer(ctx, id, cfg, idleConfig("c")); err == nil {
					err = n.StartContainer(ctx, c)
				}
			}
			done <- err
		}()
	}
	// The first sign that the pods' networks are up: starts are half-way.
	require.NoError(t, testnode.Eventually(ctx, func(ctx context.Context) error {
		now, err := n.Census(ctx)
		if err != nil {
			return err
		}
		if len(done) < pods && now.Count("link") < before.Count("link")+pods {
			return fmt.Errorf("%d links", now.Count("link"))
		}
		return nil
	}))
	require.NoError(t, n.Kill(ctx))
	for range pods {
		// It fails, as containerd has gone, or has been faster than that.
		t.Log(<-done)
	}
	require.NoError(t, n.Start(ctx))
	require.NoError(t, n.RemoveAllPods(ctx))
	require.NoError(t, n.AwaitCensus(ctx, before))
}
