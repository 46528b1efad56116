// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"k8s.io/client-go/tools/remotecommand"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// session is an exec or an attach that a client has open.
type session struct {
	in    *io.PipeWriter
	out   *bufio.Reader
	ended chan error
}

// openSession opens one at the address that CRI gives for these streams.
func openSession(t *testing.T, address func(remotecommand.StreamOptions) string) *session {
	t.Helper()
	in, stdin := io.Pipe()
	stdout, out := io.Pipe()
	s := &session{in: stdin, out: bufio.NewReader(stdout), ended: make(chan error, 1)}
	opts := remotecommand.StreamOptions{Stdin: in, Stdout: out}
	to, ctx := address(opts), testContext(t)
	go func() {
		err := serve(ctx, to, opts)
		_ = out.Close()
		s.ended <- err
	}()
	return s
}

// end waits until the session has ended, and returns with what.
func (s *session) end(t *testing.T) error {
	t.Helper()
	select {
	case err := <-s.ended:
		return err
	case <-time.After(testnode.Scale(30 * time.Second)):
		require.Fail(t, "the session does not end")
		return nil
	}
}

// echoes sends a line and gets it back.
func (s *session) echoes(t *testing.T, line string) {
	t.Helper()
	answer := make(chan string, 1)
	go func() {
		_, _ = fmt.Fprintln(s.in, line)
		got, _ := s.out.ReadString('\n')
		answer <- got
	}()
	select {
	case got := <-answer:
		require.Equal(t, "got "+line+"\n", got)
	case <-time.After(testnode.Scale(30 * time.Second)):
		require.Fail(t, "no answer to "+line)
	}
}

// TestRestartSessions has clients attached and commands running by exec when containerd ends:
// the clients notice, the container goes on, and when containerd is back others are served.
func TestRestartSessions(t *testing.T) {
	const echo = `while read line; do echo "got $line"; done; exit 5`
	forHandlers(t, func(t *testing.T, h string) {
		for name, end := range map[string]func(context.Context) error{"stop": node(t).Stop, "kill": node(t).Kill} {
			t.Run(name, func(t *testing.T) {
				p := newPod(t, h)
				cfg := shellConfig("c", echo)
				cfg.Stdin = true
				c := p.start(cfg)
				exec := func(o remotecommand.StreamOptions) string { return c.execURL(o, "/bin/sh", "-c", echo) }
				attached, executed := openSession(t, c.attachURL), openSession(t, exec)
				attached.echoes(t, "one")
				executed.echoes(t, "two")

				require.NoError(t, end(testContext(t)))
				t.Logf("the clients are told: attach: %v; exec: %v", attached.end(t), executed.end(t))
				require.NoError(t, p.n.Start(testContext(t)))

				attached, executed = openSession(t, c.attachURL), openSession(t, exec)
				attached.echoes(t, "three")
				executed.echoes(t, "four")
				require.NoError(t, executed.in.Close())
				require.ErrorContains(t, executed.end(t), "exit code 5")
				lines := c.awaitLog(func(l []logLine) bool { return len(l) == 2 })
				require.Equal(t, []string{"got one", "got three"}, []string{lines[0].text, lines[1].text})
				require.NoError(t, p.n.StopContainer(testContext(t), c.id, time.Second))
				t.Logf("the container's end, to who is attached: %v", attached.end(t))
			})
		}
	})
}

// TestRestartOOM has a container killed for its memory while containerd is away. What runc's
// shim tells then is lost; ours tells it again.
func TestRestartOOM(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		greed := newLatch(t, p.n)
		cfg := shellConfig("greedy", fmt.Sprint(testimage.HelperPath, " until ", greed.addr, " 0 >/dev/null; exec ", testimage.HelperPath, " hold ", 128<<20))
		cfg.Linux.Resources.MemoryLimitInBytes = 48 << 20
		cfg.Stdin = true
		greedy := p.start(cfg)
		release := greed.accept(t)

		require.NoError(t, p.n.Kill(testContext(t)))
		require.NoError(t, release.Close())
		// The kernel needs a moment; nobody can be asked whether it is over.
		time.Sleep(testnode.Scale(2 * time.Second))
		require.NoError(t, p.n.Start(testContext(t)))
		st := greedy.awaitExit()
		t.Logf("exit code %d, reason %s", st.GetExitCode(), st.GetReason())
		if h == testnode.CloudHV {
			require.Equal(t, int32(137), st.GetExitCode())
			require.Equal(t, "OOMKilled", st.GetReason())
		}
	})
}
