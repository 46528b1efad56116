// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"context"
	"fmt"
	"math"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

const (
	// So many lines are written before containerd ends, up to when it ends and comes
	// back, and when it is back. Those between are 2 MB, which is more than all buffers
	// on their way.
	early, flowing, late = 50, 1500, 1700
	// parting is how many lines a container writes last, 150 KB: more than a pipe
	// holds, and less than is on the way from our guest.
	parting = 120
)

// scriptLine is a line of writeLines. Some are longer than a buffer of any copy,
// and one is longer than CRI's own.
func scriptLine(i int) string {
	n := 500
	switch {
	case i == 700:
		n = 20_000
	case i%7 == 3:
		n = 6_000
	}
	return fmt.Sprint("line ", i, " ", strings.Repeat("x", n))
}

// writeLines is a function of the shell that writes the numbered lines from $1 to
// $2, each tenth to stderr, with pauses.
const writeLines = `
repeat() { printf "%$1s" "" | tr " " x; }
short=$(repeat 500) long=$(repeat 6000) longest=$(repeat 20000)
lines() {
	i=$1
	while [ $i -lt $2 ]; do
		text=$short
		[ $((i % 7)) -ne 3 ] || text=$long
		[ $i -ne 700 ] || text=$longest
		case $i in
		*9) echo "line $i $text" >&2; sleep 0.02 ;;
		*) echo "line $i $text" ;;
		esac
		i=$((i + 1))
	done
}
`

// TestRestart is point 10.
func TestRestart(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		n := node(t)
		for name, end := range map[string]func(context.Context) error{"stop": n.Stop, "kill": n.Kill} {
			t.Run(name, func(t *testing.T) { restart(newPod(t, h), end) })
		}
	})
}

// restart ends containerd as said and starts it again, while a pod's containers write, end and idle.
func restart(p *pod, end func(context.Context) error) {
	t, n, h := p.t, p.n, p.handler
	// What containerd has read and not written when it is killed is lost, so nothing
	// is on its way at that time.
	away, back := newLatch(t, n), newLatch(t, n)
	until := testimage.HelperPath + " until"
	writer := p.start(shellConfig("writer", fmt.Sprintf("%s lines 0 %d; %s %s 0 >/dev/null; lines %d %d; %s %s 0 >/dev/null; lines %d %d; exit 6",
		writeLines, early, until, away.addr, early, flowing, until, back.addr, flowing, late)))
	idle := p.idle("idle")
	meanwhile := startLeaver(p)
	created := p.create(idleConfig("created"))
	held := p.start(limited("held", 256*mib, "hold", strconv.Itoa(96*mib)))
	held.awaitLine("ok")
	used := held.stats().GetCpu().GetUsageCoreNanoSeconds().GetValue()
	write := away.accept(t)
	writer.awaitLog(func(l []logLine) bool { return len(l) == early })
	ips := p.ips()
	var before info
	if h == testnode.CloudHV {
		before = p.info()
	}

	require.NoError(t, end(testContext(t)))
	require.NoError(t, write.Close())
	meanwhile.leave(t)
	require.Equal(t, early, len(readWhole(t, writer)), "lines of the log")
	require.NoError(t, n.Start(testContext(t)))

	require.Equal(t, runtimeapi.PodSandboxState_SANDBOX_READY, p.state())
	require.Equal(t, ips, p.ips())
	meanwhile.check(t, h)
	require.GreaterOrEqual(t, held.stats().GetCpu().GetUsageCoreNanoSeconds().GetValue(), used, "processor time")
	// Figures may be some seconds old, and of when the memory was not all held.
	require.NoError(t, testnode.Eventually(testContext(t), func(context.Context) error {
		if rss := held.stats().GetMemory().GetRssBytes().GetValue(); math.Abs(float64(rss)/mib-96) > 96*near/100.0 {
			return fmt.Errorf("a container that holds 96 MiB has %.1f by its figures", float64(rss)/mib)
		}
		return nil
	}))
	// What was on its way comes, and what is written from now on.
	writer.awaitLog(func(l []logLine) bool { return len(l) == flowing })
	require.NoError(t, back.accept(t).Close())
	idle.exec("true")
	require.NoError(t, n.StartContainer(testContext(t), created.id))
	created.exec("true")
	p.idle("new").exec("true")
	if h == testnode.CloudHV {
		after := p.info()
		require.Equal(t, []int{before.VMMPid, before.ShimPid}, []int{after.VMMPid, after.ShimPid}, "the same processes")
	}
	require.Equal(t, int32(6), writer.awaitExit().GetExitCode())
	require.Equal(t, late, len(readWhole(t, writer)), "lines of the log")
	require.NoError(t, n.StopContainer(testContext(t), idle.id, 0))
	podBy(t, n, h).idle("other").exec("true")
}

// leaver is a container that ends while containerd is away, after its last words.
type leaver struct {
	*container
	release net.Conn // its end makes the container write and end
	ended   net.Conn // is closed when the container has ended
	// released and left are when it was told to end, and when it had.
	released, left time.Time
}

func startLeaver(p *pod) *leaver {
	p.t.Helper()
	release, ended := newLatch(p.t, p.n), newLatch(p.t, p.n)
	until := testimage.HelperPath + " until"
	n := parting
	if p.handler == testnode.RunC {
		n = 10 // a pipe is all there is
	}
	c := p.start(shellConfig("meanwhile", fmt.Sprintf("%s %s %s 0 >/dev/null & %s %s 0 >/dev/null; lines 0 %d; exit 7",
		writeLines, until, ended.addr, until, release.addr, n)))
	return &leaver{container: c, ended: ended.accept(p.t), release: release.accept(p.t)}
}

// leave makes the container end, and returns when it has.
func (l *leaver) leave(t *testing.T) {
	t.Helper()
	l.released = time.Now()
	require.NoError(t, l.release.Close())
	require.NoError(t, l.ended.SetReadDeadline(time.Now().Add(testnode.Scale(time.Minute))))
	_, err := l.ended.Read(make([]byte, 1))
	require.NotErrorIs(t, err, os.ErrDeadlineExceeded)
	l.left = time.Now()
	require.NoError(t, l.ended.Close())
}

// check checks what containerd has learned when it is back.
func (l *leaver) check(t *testing.T, h string) {
	t.Helper()
	st := l.awaitExit()
	if h == testnode.RunC {
		// containerd takes a container without processes for one whose shim is gone,
		// and then knows no exit code. A task that it finds stopped it deletes, and
		// with it the output that is unread. Our shim still has both.
		require.Contains(t, []int32{7, 255}, st.GetExitCode())
		return
	}
	require.Equal(t, int32(7), st.GetExitCode())
	require.Equal(t, "Error", st.GetReason())
	ended := time.Unix(0, st.GetFinishedAt())
	require.WithinRange(t, ended, l.released.Add(-time.Second), l.left.Add(time.Second), "the time of its end, by the guest's clock")
	require.Equal(t, parting, len(readWhole(t, l.container)), "lines of the log")
}

// readWhole returns the log, which must have each line once, in order, on its stream.
func readWhole(t *testing.T, c *container) []logLine {
	t.Helper()
	log, err := readLog(c.log)
	require.NoError(t, err)
	next := map[string]int{"stdout": 0, "stderr": 9}
	for _, l := range log {
		if l.text != scriptLine(next[l.stream]) {
			require.Equal(t, scriptLine(next[l.stream]), l.text, l.stream)
		}
		switch {
		case l.stream == "stderr":
			next[l.stream] += 10
		case next[l.stream]%10 == 8:
			next[l.stream] += 2
		default:
			next[l.stream]++
		}
	}
	return log
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
