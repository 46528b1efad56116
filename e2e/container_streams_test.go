// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"k8s.io/client-go/tools/remotecommand"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// TestExecsAtOnce runs 50 execs in one container at once: each has its own output,
// errors and exit code, and nothing of them is left.
func TestExecsAtOnce(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		const execs = 50
		p := newPod(t, h)
		c := p.idle("c")
		var wg sync.WaitGroup
		for i := range execs {
			wg.Go(func() {
				out, errOut, code, err := p.n.ExecSync(testContext(t), c.id, "/bin/sh", "-c", fmt.Sprintf("echo out-%d; echo err-%d >&2; exit %d", i, i, i))
				assert.NoError(t, err)
				assert.Equal(t, fmt.Sprintf("out-%d\n", i), out)
				assert.Equal(t, fmt.Sprintf("err-%d\n", i), errOut)
				assert.Equal(t, i, code)
			})
		}
		wg.Wait()
		// What is left is the container's own process and this shell.
		require.Equal(t, "2\n", c.sh("set -- /proc/[0-9]*; echo $#"))
	})
}

// TestHalfClosedInput ends the input of a process that goes on to write, by exec and
// by attach, and sees all of its output.
func TestHalfClosedInput(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		const script = `cat; echo "end of input"; i=0; while [ $i -lt 3 ]; do sleep 0.2; echo after $i; i=$((i+1)); done; echo err >&2`
		const want = "some input\nend of input\nafter 0\nafter 1\nafter 2\n"
		p := newPod(t, h)
		c := p.idle("c")
		var out, errOut strings.Builder
		require.NoError(t, c.stream(remotecommand.StreamOptions{Stdin: strings.NewReader("some input\n"), Stdout: &out, Stderr: &errOut}, "/bin/sh", "-c", script))
		require.Equal(t, want, out.String())
		require.Equal(t, "err\n", errOut.String())

		cfg := shellConfig("attached", script)
		cfg.Stdin, cfg.StdinOnce = true, true
		a := p.start(cfg)
		require.NoError(t, a.attach(remotecommand.StreamOptions{Stdin: strings.NewReader("some input\n"), Stdout: io.Discard, Stderr: io.Discard}))
		require.Zero(t, a.awaitExit().GetExitCode())
		require.Equal(t, want, a.text("stdout"))
		require.Equal(t, "err\n", a.text("stderr"))
	})
}

// text is what the container's log has of a stream.
func (c *container) text(stream string) string {
	c.t.Helper()
	var b strings.Builder
	require.NoError(c.t, scanLog(c.log, func(l logLine) {
		if l.stream == stream {
			b.WriteString(l.text + "\n")
		}
	}))
	return b.String()
}

// TestLongLogLines writes lines around the length at which CRI splits them, and of
// 1 MB, on both streams.
func TestLongLogLines(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		const script = `line() { head -c $2 /dev/zero | tr '\0' $1; echo; }
for n in 16383 16384 16385 1048576; do line a $n; line b $n >&2; done; printf unfinished`
		c := p.start(shellConfig("c", script))
		require.Zero(t, c.awaitExit().GetExitCode())
		for stream, letter := range map[string]string{"stdout": "a", "stderr": "b"} {
			lines := strings.Split(c.text(stream), "\n")
			for i, n := range []int{16383, 16384, 16385, 1048576} {
				require.Greater(t, len(lines), i, stream)
				require.True(t, lines[i] == strings.Repeat(letter, n), "line %d of %s has %d bytes, want %d", i, stream, len(lines[i]), n)
			}
		}
		// A line without an end is marked as a part.
		b, err := os.ReadFile(c.log)
		require.NoError(t, err)
		require.Contains(t, string(b), " stdout P unfinished\n")
	})
}

// TestLogReopened moves a container's log away, as kubelet's rotation does, and has it
// opened again: no line is lost, and none is in both.
func TestLogReopened(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		c := p.start(helperConfig("c", "count", "0", "120", "10ms", "0"))
		c.awaitLog(func(l []logLine) bool { return len(l) > 20 })
		require.NoError(t, os.Rename(c.log, c.log+".1"))
		_, err := p.n.Runtime().ReopenContainerLog(testContext(t), &runtimeapi.ReopenContainerLogRequest{ContainerId: c.id})
		require.NoError(t, err)
		require.Zero(t, c.awaitExit().GetExitCode())
		seen := map[string]int{}
		for _, f := range []string{c.log + ".1", c.log} {
			lines, err := readLog(f)
			require.NoError(t, err)
			require.NotEmpty(t, lines, f)
			for _, l := range lines {
				seen[l.text]++
			}
		}
		for i := range 120 {
			require.Equal(t, 1, seen[fmt.Sprintf("line %d", i)], "line %d", i)
		}
		_, err = p.n.Runtime().ReopenContainerLog(testContext(t), &runtimeapi.ReopenContainerLogRequest{ContainerId: c.id})
		require.Error(t, err, "the log of a container that has ended")
	})
}

// sizes are a terminal's, given when asked for.
type sizes chan remotecommand.TerminalSize

// Next implements remotecommand.TerminalSizeQueue.
func (s sizes) Next() *remotecommand.TerminalSize {
	size, ok := <-s
	if !ok {
		return nil
	}
	return &size
}

// TestTerminal attaches to a container with a terminal and resizes it twice; the log
// has what the terminal showed.
func TestTerminal(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		cfg := shellConfig("c", `stty -echo; tty; while read line; do echo "got $line"; [ "$line" = end ] && exit 7; stty size; done; exit 1`)
		cfg.Stdin, cfg.Tty = true, true
		c := p.start(cfg)
		in, typed := io.Pipe()
		shown, out := io.Pipe()
		size := make(sizes, 1)
		size <- remotecommand.TerminalSize{Width: 91, Height: 17}
		done := make(chan error, 1)
		go func() {
			done <- c.attach(remotecommand.StreamOptions{Stdin: in, Stdout: out, Tty: true, TerminalSizeQueue: size})
			_ = out.Close()
		}()
		screen := &screen{}
		go func() { _, _ = io.Copy(screen, shown) }()
		await := func(text string, again string) {
			t.Helper()
			require.NoError(t, testnode.Eventually(testContext(t), func(context.Context) error {
				if again != "" {
					if _, err := io.WriteString(typed, again); err != nil {
						return err
					}
				}
				if !strings.Contains(screen.String(), text) {
					return fmt.Errorf("the terminal shows %q, not yet %q", screen.String(), text)
				}
				return nil
			}))
		}
		await("17 91", "one\n")
		require.Contains(t, screen.String(), "got one")
		size <- remotecommand.TerminalSize{Width: 132, Height: 43}
		await("43 132", "two\n")
		close(size)
		_, err := io.WriteString(typed, "end\n")
		require.NoError(t, err)
		require.Equal(t, int32(7), c.awaitExit().GetExitCode())
		require.NoError(t, <-done)
		log := c.text("stdout")
		require.Contains(t, log, "/dev/pts/0")
		require.Contains(t, log, "43 132")
		require.Empty(t, c.text("stderr"), "a terminal has one stream")
	})
}

// screen collects what a terminal shows.
type screen struct {
	mu sync.Mutex
	b  strings.Builder
}

// Write implements io.Writer.
func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

// String is all that was shown.
func (s *screen) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// TestExecUser runs execs in a container of another user: they have its identity,
// capabilities and environment, and a terminal of their own if they want one.
func TestExecUser(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		cfg := helperConfig("c", "term", "0")
		cfg.Envs = []*runtimeapi.KeyValue{{Key: "OF_CONTAINER", Value: []byte("yes")}}
		securityContext(func(s *runtimeapi.LinuxContainerSecurityContext) {
			s.RunAsUser, s.SupplementalGroups, s.NoNewPrivs = &runtimeapi.Int64Value{Value: 1000}, []int64{77}, true
		})(cfg)
		c := p.start(cfg)
		c.awaitLine("ready")
		require.Equal(t, "1000 77 1000 2000 2001 yes /work 1\n",
			c.sh("echo $(id -u) $(id -G | tr ' ' '\\n' | sort -n | tr '\\n' ' ') $OF_CONTAINER $PWD $(awk '/^NoNewPrivs/ { print $2 }' /proc/self/status)"))
		var out strings.Builder
		require.NoError(t, c.stream(remotecommand.StreamOptions{Stdout: &out, Tty: true}, "/bin/sh", "-c", "tty; test -t 0 -a -t 1 -a -t 2 && echo terminal"))
		require.Contains(t, out.String(), "/dev/pts/")
		require.Contains(t, out.String(), "terminal\r\n")
		require.Equal(t, "no\n", c.sh("test -t 0 || echo no"))
	})
}
