// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"k8s.io/client-go/tools/remotecommand"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testimage/pattern"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// bounded is by how much memory may grow while a reader stalls.
const bounded = 8 << 20

// stallingWriter sums up what it gets. After so many bytes it calls stall once.
type stallingWriter struct {
	sum   pattern.Checksum
	n     int64
	after int64
	stall func()
}

// Write implements io.Writer.
func (w *stallingWriter) Write(p []byte) (int, error) {
	if w.n < w.after && w.n+int64(len(p)) >= w.after {
		w.stall()
	}
	w.n += int64(len(p))
	return w.sum.Write(p)
}

// guestMemory is what is available in the container's machine, in bytes.
func (c *container) guestMemory() int64 {
	c.t.Helper()
	var total, available int64
	_, err := fmt.Sscan(c.exec(testimage.HelperPath, "mem"), &total, &available)
	require.NoError(c.t, err)
	return available
}

// TestOutputToStallingReader is the first half of point 5, by exec.
func TestOutputToStallingReader(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		c := p.idle("c")
		before := c.guestMemory()
		var least int64
		out := &stallingWriter{after: 10 << 20, stall: func() {
			// The stall is the test itself: nothing can tell that nothing happens.
			time.Sleep(2 * time.Second)
			least = c.guestMemory()
			time.Sleep(2 * time.Second)
			least = min(least, c.guestMemory())
		}}
		var errOut strings.Builder
		require.NoError(t, c.stream(remotecommand.StreamOptions{Stdout: out, Stderr: &errOut}, testimage.HelperPath, "gen", strconv.FormatInt(count.outputBytes, 10), "9"))
		require.Equal(t, count.outputBytes, out.n)
		require.Equal(t, pattern.Sum(9, count.outputBytes), out.sum.String())
		require.Equal(t, pattern.Line(9, count.outputBytes)+"\n", errOut.String())
		if h == testnode.CloudHV {
			t.Logf("%d KiB of the guest's memory were taken", (before-least)>>10)
			require.Less(t, before-least, int64(bounded), "memory taken in the guest while the reader stalled")
		}
	})
}

// TestLogToStoppedContainerd is the same for a container's log: containerd, which
// writes it, is stopped for a while. The guest's memory is asked for over the
// pod's network then.
func TestLogToStoppedContainerd(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		p.start(helperConfig("memory", "memd", port)).awaitLine("listening")
		addr := net.JoinHostPort(p.ips()[0], port)
		before := askMemory(t, addr)
		c := p.start(helperConfig("c", "gen", strconv.FormatInt(count.outputBytes, 10), "10"))
		c.awaitLog(func(l []logLine) bool { return len(l) > 100 })
		require.NoError(t, syscall.Kill(p.n.Pid(), syscall.SIGSTOP))
		t.Cleanup(func() { _ = syscall.Kill(p.n.Pid(), syscall.SIGCONT) })
		time.Sleep(2 * time.Second) // the stall itself
		least := askMemory(t, addr)
		time.Sleep(2 * time.Second)
		least = min(least, askMemory(t, addr))
		require.NoError(t, syscall.Kill(p.n.Pid(), syscall.SIGCONT))
		require.Zero(t, c.awaitExit().GetExitCode())
		var sum pattern.Checksum
		var errLine string
		require.NoError(t, scanLog(c.log, func(l logLine) {
			if l.stream == "stderr" {
				errLine = l.text
				return
			}
			// It cannot fail.
			_, _ = io.WriteString(&sum, l.text+"\n")
		}))
		require.Equal(t, pattern.Sum(10, count.outputBytes), sum.String())
		require.Equal(t, pattern.Line(10, count.outputBytes), errLine)
		if h == testnode.CloudHV {
			t.Logf("%d KiB of the guest's memory were taken", (before-least)>>10)
			require.Less(t, before-least, int64(bounded), "memory taken in the guest while the log stood still")
		}
	})
}

// askMemory asks a memd what is available in its machine, in bytes.
func askMemory(t *testing.T, addr string) int64 {
	t.Helper()
	limit := testnode.Scale(30 * time.Second)
	conn, err := net.DialTimeout("tcp", addr, limit)
	require.NoError(t, err)
	defer conn.Close()
	require.NoError(t, conn.SetDeadline(time.Now().Add(limit)))
	var total, available int64
	_, err = fmt.Fscan(conn, &total, &available)
	require.NoError(t, err)
	return available
}

// TestInput is the second half of point 5, by exec and by attach.
func TestInput(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		c := p.idle("c")
		var out strings.Builder
		require.NoError(t, c.stream(remotecommand.StreamOptions{Stdin: pattern.New(11, count.inputBytes), Stdout: &out}, testimage.HelperPath, "sink"))
		require.Equal(t, pattern.Line(11, count.inputBytes)+"\n", out.String())

		cfg := helperConfig("sink", "sink")
		cfg.Stdin, cfg.StdinOnce = true, true
		sink := p.start(cfg)
		require.NoError(t, sink.attach(remotecommand.StreamOptions{Stdin: pattern.New(12, count.inputBytes), Stdout: io.Discard, Stderr: io.Discard}))
		require.Zero(t, sink.awaitExit().GetExitCode())
		sink.awaitLine(pattern.Line(12, count.inputBytes))
	})
}

// TestInputUnread checks that a process that never reads its input ends well,
// and that one without an input sees the end of it.
func TestInputUnread(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		c := p.idle("c")
		pr, pw := io.Pipe()
		defer pw.Close()
		var out bytes.Buffer
		require.NoError(t, c.stream(remotecommand.StreamOptions{Stdin: pr, Stdout: &out}, "echo", "done"))
		require.Equal(t, "done\n", out.String())
		out.Reset()
		require.NoError(t, c.stream(remotecommand.StreamOptions{Stdout: &out}, testimage.HelperPath, "sink"))
		require.Equal(t, pattern.Line(0, 0)+"\n", out.String())
	})
}

// TestBinaryStreams checks that bytes stay what they are, both ways at once.
func TestBinaryStreams(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		c := p.idle("c")
		data := make([]byte, 1<<20)
		for i := range data {
			data[i] = byte(i * 7 / 5)
		}
		var out bytes.Buffer
		require.NoError(t, c.stream(remotecommand.StreamOptions{Stdin: bytes.NewReader(data), Stdout: &out}, "cat"))
		require.True(t, bytes.Equal(data, out.Bytes()), "%d bytes came back", out.Len())
	})
}

// TestBackgroundHoldsOutput checks an exec whose process leaves another behind
// that holds its output: ExecSync must still return within its time limit, and
// what was written before is there.
func TestBackgroundHoldsOutput(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		c := p.idle("c")
		ctx, cancel := context.WithTimeout(testContext(t), testnode.Scale(20*time.Second))
		defer cancel()
		var out bytes.Buffer
		done := make(chan error, 1)
		go func() {
			done <- c.stream(remotecommand.StreamOptions{Stdout: &out}, "/bin/sh", "-c", "sleep 3 & echo first")
		}()
		select {
		case err := <-done:
			require.NoError(t, err)
		case <-ctx.Done():
			require.Fail(t, "exec does not return")
		}
		require.Equal(t, "first\n", out.String())
	})
}

// hostMemory is the memory that a process has for itself, in bytes.
func hostMemory(t *testing.T, pid int) int64 {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	require.NoError(t, err)
	var sum int64
	for _, name := range []string{"Private_Clean:", "Private_Dirty:"} {
		kb, err := strconv.ParseInt(strings.TrimSuffix(field(string(b), name), " kB"), 10, 64)
		require.NoError(t, err)
		sum += kb << 10
	}
	return sum
}

// TestShimMemoryBounded checks that the pod's shim keeps little of what passes through.
func TestShimMemoryBounded(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		c := p.idle("c")
		pid := p.shimPid()
		before := hostMemory(t, pid)
		var during int64
		out := &stallingWriter{after: 4 << 20, stall: func() {
			time.Sleep(time.Second) // the stall itself
			during = hostMemory(t, pid)
		}}
		require.NoError(t, c.stream(remotecommand.StreamOptions{Stdout: out}, testimage.HelperPath, "gen", strconv.Itoa(32<<20), "13"))
		require.Equal(t, pattern.Sum(13, 32<<20), out.sum.String())
		require.Less(t, during-before, int64(8<<20))
	})
}
