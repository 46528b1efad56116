// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/console"
	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// cli runs crictl for one test.
type cli struct {
	t   *testing.T
	n   *testnode.Node
	ctx context.Context
}

// run runs crictl, which must succeed, and returns its trimmed standard output.
func (c cli) run(args ...string) string {
	c.t.Helper()
	out, errOut, err := c.n.Crictl(c.ctx, args...)
	require.NoError(c.t, err, "crictl %q: %s%s\n%s", args, out, errOut, c.n.LogTail(2000))
	return strings.TrimSpace(out)
}

// file writes a configuration for crictl.
func (c cli) file(name string, cfg any) string {
	c.t.Helper()
	b, err := json.Marshal(cfg)
	require.NoError(c.t, err)
	path := filepath.Join(c.t.TempDir(), name)
	require.NoError(c.t, os.WriteFile(path, b, 0o600))
	return path
}

// interactiveScript prints a line for each that it reads, on both streams, and
// ends with the input.
const interactiveScript = `echo started; while read line; do echo "out: $line"; echo "err: $line" >&2; done; echo ended`

// TestCrictl is point 1: what people do with crictl works by every handler.
func TestCrictl(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		c := cli{t: t, n: node(t), ctx: testContext(t)}
		cfg := podConfig(t)
		// crictl's own default, a pod-wide PID namespace.
		cfg.Linux.SecurityContext.NamespaceOptions = nil
		podFile := c.file("pod.json", cfg)
		pod := c.run("runp", "--runtime", h, podFile)
		removed := false
		t.Cleanup(func() {
			if !removed {
				cl := cli{t: t, n: c.n, ctx: testContext(t)}
				cl.run("rmp", "-f", pod)
			}
		})
		ctrCfg := testnode.ContainerConfig("server", testimage.HelperRef, "/bin/sh", "-c", interactiveScript+"; trap 'exit 0' TERM; while :; do sleep 1 & wait; done")
		ctrCfg.Stdin, ctrCfg.StdinOnce = true, true
		ctrCfg.Linux.SecurityContext.NamespaceOptions = nil
		ctr := c.run("create", pod, c.file("ctr.json", ctrCfg), podFile)
		require.Equal(t, "CONTAINER_CREATED", c.field("inspect", ctr, "status", "state"))
		c.run("start", ctr)

		c.lists(pod, ctr, cfg)
		c.execs(ctr)
		c.execTTY(ctr)
		c.attach(ctr)
		c.logs(ctr)

		c.run("stop", ctr)
		require.Equal(t, "CONTAINER_EXITED", c.field("inspect", ctr, "status", "state"))
		c.run("rm", ctr)
		c.run("stopp", pod)
		require.Equal(t, "SANDBOX_NOTREADY", c.field("inspectp", pod, "status", "state"))
		c.run("rmp", pod)
		removed = true
		require.NotContains(t, c.run("pods", "-q"), pod)
	})
}

// field inspects and returns a text deep in the answer.
func (c cli) field(inspect, id string, path ...string) string {
	c.t.Helper()
	var v any
	require.NoError(c.t, json.Unmarshal([]byte(c.run(inspect, id)), &v))
	for _, p := range path {
		m, ok := v.(map[string]any)
		require.True(c.t, ok, "no %s in %s of %s", p, inspect, id)
		v = m[p]
	}
	s, ok := v.(string)
	require.True(c.t, ok, "%v in %s of %s is not a text: %v", path, inspect, id, v)
	return s
}

func (c cli) lists(pod, ctr string, cfg *runtimeapi.PodSandboxConfig) {
	c.t.Helper()
	require.Contains(c.t, c.run("pods", "--no-trunc"), pod)
	require.Equal(c.t, pod, c.run("pods", "-q", "--no-trunc", "--name", cfg.GetMetadata().GetName(), "--state", "ready"))
	require.Equal(c.t, ctr, c.run("ps", "-q", "--no-trunc", "--pod", pod))
	require.Equal(c.t, "CONTAINER_RUNNING", c.field("inspect", ctr, "status", "state"))
	require.Equal(c.t, "SANDBOX_READY", c.field("inspectp", pod, "status", "state"))
	require.NotEmpty(c.t, c.field("inspectp", pod, "status", "network", "ip"))
	require.Contains(c.t, c.run("stats", "--id", ctr), ctr[:12])
}

func (c cli) execs(ctr string) {
	c.t.Helper()
	require.Equal(c.t, "hello", c.run("exec", "--sync", ctr, "echo", "hello"))
	_, errOut, err := c.n.Crictl(c.ctx, "exec", "--sync", ctr, "sh", "-c", "echo to-stderr >&2; exit 7")
	var exit *exec.ExitError
	require.ErrorAs(c.t, err, &exit)
	require.Contains(c.t, errOut, "to-stderr")
	require.Contains(c.t, errOut, "7")

	cmd := c.n.CrictlCommand(c.ctx, "exec", "-i", ctr, "sh", "-c", interactiveScript)
	cmd.Stdin = strings.NewReader("one\ntwo\n")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	require.NoError(c.t, err, "%s%s", out, &stderr)
	require.Equal(c.t, "started\nout: one\nout: two\nended\n", string(out))
	require.Contains(c.t, stderr.String(), "err: one\nerr: two\n")
}

// execTTY runs a shell on a terminal of 100 by 30.
func (c cli) execTTY(ctr string) {
	c.t.Helper()
	ours, path, err := console.NewPty()
	require.NoError(c.t, err)
	defer ours.Close()
	require.NoError(c.t, ours.Resize(console.WinSize{Width: 100, Height: 30}))
	theirs, err := os.OpenFile(path, os.O_RDWR, 0)
	require.NoError(c.t, err)
	cmd := c.n.CrictlCommand(c.ctx, "exec", "-i", "-t", ctr, "sh")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs, theirs, theirs
	require.NoError(c.t, cmd.Start())
	require.NoError(c.t, theirs.Close())
	lines := make(chan string, 1024)
	go func() {
		defer close(lines)
		for s := bufio.NewScanner(ours); s.Scan(); {
			lines <- strings.TrimSpace(s.Text())
		}
	}()
	// The size arrives after the start: ask until it is there.
	_, err = io.WriteString(ours, "tty; until stty size | grep -q '30 100'; do :; done; echo size-$((30*100)); exit 3\n")
	require.NoError(c.t, err)
	var seen []string
	for line := range lines {
		seen = append(seen, line)
	}
	err = cmd.Wait()
	var exit *exec.ExitError
	require.ErrorAs(c.t, err, &exit, "%q", seen)
	require.Contains(c.t, strings.Join(seen, "\n"), "/dev/pts/")
	require.Contains(c.t, seen, "size-3000")
}

// attach talks to the container's own process until its input ends.
func (c cli) attach(ctr string) {
	c.t.Helper()
	cmd := c.n.CrictlCommand(c.ctx, "attach", "-i", ctr)
	in, err := cmd.StdinPipe()
	require.NoError(c.t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(c.t, err)
	stderr, err := cmd.StderrPipe()
	require.NoError(c.t, err)
	require.NoError(c.t, cmd.Start())
	_, err = io.WriteString(in, "attached\n")
	require.NoError(c.t, err)
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(c.t, err)
	require.Equal(c.t, "out: attached\n", line)
	errLines := bufio.NewScanner(stderr)
	for errLines.Scan() && errLines.Text() != "err: attached" {
	}
	require.Equal(c.t, "err: attached", errLines.Text(), "nothing on standard error")
	require.NoError(c.t, in.Close())
	// The container lives on without an input. crictl may or may not notice.
	require.NoError(c.t, cmd.Process.Kill())
	var exit *exec.ExitError
	if err := cmd.Wait(); err != nil {
		require.True(c.t, errors.As(err, &exit) || errors.Is(err, os.ErrClosed), "%v", err)
	}
}

// logs follows the log and reads both streams.
func (c cli) logs(ctr string) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.ctx, testnode.Scale(time.Minute))
	defer cancel()
	follow := c.n.CrictlCommand(ctx, "logs", "-f", ctr)
	out, err := follow.StdoutPipe()
	require.NoError(c.t, err)
	require.NoError(c.t, follow.Start())
	var got []string
	for s := bufio.NewScanner(out); s.Scan(); {
		got = append(got, s.Text())
		if s.Text() == "ended" {
			break
		}
	}
	require.NoError(c.t, follow.Process.Kill())
	_ = follow.Wait()
	require.Equal(c.t, []string{"started", "out: attached", "ended"}, got)
	stdout, stderr, err := c.n.Crictl(ctx, "logs", ctr)
	require.NoError(c.t, err)
	require.Equal(c.t, "started\nout: attached\nended\n", stdout)
	require.Contains(c.t, stderr, "err: attached\n")
	require.Equal(c.t, "ended", c.run("logs", "--tail", "1", ctr))
}
