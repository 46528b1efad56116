// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"io"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/client-go/tools/remotecommand"
	utilexec "k8s.io/client-go/util/exec"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// TestExitCodes is the first half of point 6.
func TestExitCodes(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		for _, tc := range []struct {
			name   string
			script string
			code   int32
			reason string
		}{
			{"zero", "exit 0", 0, "Completed"},
			{"one", "exit 1", 1, "Error"},
			{"large", "exit 255", 255, "Error"},
			{"killed", "sh -c 'kill -9 $$'; exit $?", 137, "Error"},
			{"terminated", "sh -c 'kill -15 $$'; exit $?", 143, "Error"},
		} {
			c := p.start(shellConfig(tc.name, tc.script))
			st := c.awaitExit()
			require.Equal(t, tc.code, st.GetExitCode(), tc.name)
			require.Equal(t, tc.reason, st.GetReason(), tc.name)
			require.WithinDuration(t, time.Now(), time.Unix(0, st.GetFinishedAt()), testnode.Scale(30*time.Second), "the guest's clock")
		}
	})
}

// TestSignalDeaths ends containers by signals that they do not handle. That takes
// the pod's PID namespace: the first process of one survives them.
func TestSignalDeaths(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		shared := func(o *runtimeapi.NamespaceOption) { o.Pid = runtimeapi.NamespaceMode_POD }
		p := newPod(t, h, func(cfg *runtimeapi.PodSandboxConfig) {
			shared(cfg.GetLinux().GetSecurityContext().GetNamespaceOptions())
		})
		other := idleConfig("other")
		shared(other.GetLinux().GetSecurityContext().GetNamespaceOptions())
		killer := p.start(other)
		stop := func(grace time.Duration) func(*container, string) {
			return func(c *container, _ string) { require.NoError(t, p.n.StopContainer(testContext(t), c.id, grace)) }
		}
		kill := func(signal string) func(*container, string) {
			return func(_ *container, pid string) { killer.exec("kill", "-"+signal, pid) }
		}
		for _, tc := range []struct {
			name string
			end  func(c *container, pid string)
			code int32
		}{
			{"stopped", stop(time.Minute), 143},
			{"stopped at once", stop(0), 137},
			{"TERM", kill("TERM"), 143},
			{"KILL", kill("KILL"), 137},
			{"SEGV", kill("SEGV"), 139},
		} {
			cfg := shellConfig(tc.name, "echo $$; exec sleep 1000")
			shared(cfg.GetLinux().GetSecurityContext().GetNamespaceOptions())
			c := p.start(cfg)
			pid := c.awaitLog(func(l []logLine) bool { return len(l) > 0 })[0].text
			require.NotEqual(t, "1", pid, tc.name)
			start := time.Now()
			tc.end(c, pid)
			st := c.awaitExit()
			require.Less(t, time.Since(start), testnode.Scale(20*time.Second), tc.name)
			require.Equal(t, tc.code, st.GetExitCode(), tc.name)
			require.Equal(t, "Error", st.GetReason(), tc.name)
		}
		killer.exec("true")
	})
}

// TestStop checks SIGTERM, the grace period and SIGKILL.
func TestStop(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		ready := func(name, arg string) *container {
			c := p.start(helperConfig(name, "term", arg))
			c.awaitLine("ready")
			return c
		}
		polite := ready("polite", "143")
		start := time.Now()
		require.NoError(t, p.n.StopContainer(testContext(t), polite.id, 60*time.Second))
		require.Less(t, time.Since(start), testnode.Scale(20*time.Second), "it ends at once")
		require.Equal(t, int32(143), polite.status().GetExitCode())
		polite.awaitLine("terminated")

		deaf := ready("deaf", "ignore")
		start = time.Now()
		require.NoError(t, p.n.StopContainer(testContext(t), deaf.id, 2*time.Second))
		require.GreaterOrEqual(t, time.Since(start), 2*time.Second, "the grace period")
		require.Less(t, time.Since(start), testnode.Scale(20*time.Second))
		require.Equal(t, int32(137), deaf.status().GetExitCode())
		require.Equal(t, "Error", deaf.status().GetReason())
		deaf.awaitLine("terminated")

		atOnce := ready("at-once", "ignore")
		require.NoError(t, p.n.StopContainer(testContext(t), atOnce.id, 0))
		require.Equal(t, int32(137), atOnce.status().GetExitCode())
	})
}

// TestStopSignal checks that an image's or configuration's stop signal is used.
func TestStopSignal(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		cfg := shellConfig("c", "trap 'echo usr1; exit 5' USR1; echo ready; while :; do sleep 1 & wait; done")
		cfg.StopSignal = runtimeapi.Signal_SIGNAL_SIGUSR1
		c := p.start(cfg)
		c.awaitLine("ready")
		require.NoError(t, p.n.StopContainer(testContext(t), c.id, 30*time.Second))
		require.Equal(t, int32(5), c.status().GetExitCode())
		c.awaitLine("usr1")
	})
}

// missing are programs that cannot be started, and what is said of them: runc and
// crun say it in words of their own.
var missing = []struct{ name, path, runc, crun string }{
	{"absolute", "/does/not/exist", "no such file or directory", "no such file or directory"},
	{"in PATH", "does-not-exist", "not found in $path", "not found in $path"},
	{"not executable", "/etc/passwd", "permission denied", "permission denied"},
	{"directory", "/etc", "permission denied", "operation not permitted"},
}

// TestMissingBinary is the second half of point 6. The classes of the errors are
// runc's.
func TestMissingBinary(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		idle := p.idle("idle")
		before, err := settled(testContext(t), p.n)
		require.NoError(t, err)
		for _, tc := range missing {
			words := tc.runc
			if h == testnode.CloudHV {
				words = tc.crun
			}
			c := p.create(testnode.ContainerConfig(tc.name, testimage.HelperRef, tc.path))
			err := p.n.StartContainer(testContext(t), c.id)
			require.Equal(t, notCreated, class(err), "%s: %v", tc.name, err)
			require.Contains(t, strings.ToLower(err.Error()), words, tc.name)
			st := c.status()
			require.Equal(t, runtimeapi.ContainerState_CONTAINER_EXITED, st.GetState(), tc.name)
			require.Equal(t, "StartError", st.GetReason(), tc.name)
			require.Equal(t, int32(128), st.GetExitCode(), tc.name)
			require.Contains(t, strings.ToLower(st.GetMessage()), words, tc.name)
			require.NoError(t, p.n.RemoveContainer(testContext(t), c.id))

			_, _, _, err = p.n.ExecSync(testContext(t), idle.id, tc.path)
			require.Equal(t, notExecuted, class(err), "%s: %v", tc.name, err)
			require.Contains(t, strings.ToLower(err.Error()), words, tc.name)
		}
		idle.exec("true")
		require.NoError(t, p.n.AwaitCensus(testContext(t), before), "what is left of them")
	})
}

// TestExecExit checks what an exec tells of its end.
func TestExecExit(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		c := p.idle("c")
		for _, code := range []int{0, 1, 42, 255} {
			_, _, got, err := p.n.ExecSync(testContext(t), c.id, testimage.HelperPath, "exit", strconv.Itoa(code))
			require.NoError(t, err)
			require.Equal(t, code, got)
		}
		_, _, got, err := p.n.ExecSync(testContext(t), c.id, "/bin/sh", "-c", "kill -9 $$")
		require.NoError(t, err)
		require.Equal(t, 137, got)

		err = c.stream(remotecommand.StreamOptions{Stdout: io.Discard}, "/bin/sh", "-c", "exit 9")
		var exit utilexec.CodeExitError
		require.ErrorAs(t, err, &exit)
		require.Equal(t, 9, exit.Code)

		start := time.Now()
		_, err = p.n.Runtime().ExecSync(testContext(t), &runtimeapi.ExecSyncRequest{ContainerId: c.id, Cmd: []string{"sleep", "1000"}, Timeout: 1})
		require.Equal(t, codes.DeadlineExceeded, status.Code(err), "%v", err)
		require.Less(t, time.Since(start), testnode.Scale(20*time.Second))
		require.Equal(t, "0\n", c.sh("ls -l /proc/[0-9]*/exe 2>/dev/null | grep -c /sleep || true"), "the process is gone too")
	})
}

// TestOOM checks a container that takes more memory than it may.
func TestOOM(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		cfg := helperConfig("c", "hold", "134217728")
		cfg.Linux.Resources.MemoryLimitInBytes = 48 << 20
		cfg.Stdin = true
		c := p.start(cfg)
		st := c.awaitExit()
		require.Equal(t, int32(137), st.GetExitCode())
		require.Equal(t, "OOMKilled", st.GetReason())
		after := p.idle("after")
		after.exec("true")
	})
}
