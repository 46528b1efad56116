// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/e2e/critest/verdict"
)

// The lists can be read, and no spec is in two of them.
func TestLists(t *testing.T) {
	t.Parallel()
	k, err := parseLists(false)
	require.NoError(t, err)
	require.Len(t, k.ours, 3)
	require.Equal(t, k.ours[2:], k.runc)
	seen := map[string]bool{}
	for _, l := range k.ours {
		for _, e := range l {
			require.False(t, seen[e.Spec], e.Spec)
			seen[e.Spec] = true
		}
	}
	require.NotEmpty(t, k.ours[0])

	real, err := parseLists(true)
	require.NoError(t, err)
	require.Equal(t, []verdict.List{k.ours[0], k.ours[1]}, real.ours)
	require.Empty(t, real.runc)
}

// sh is a shell command whose output, and that of execSuite, goes to the file.
func sh(t *testing.T, script string) (*exec.Cmd, *os.File) {
	t.Helper()
	log, err := os.OpenFile(filepath.Join(t.TempDir(), "log"), os.O_RDWR|os.O_CREATE, 0o600)
	require.NoError(t, err)
	t.Cleanup(func() { log.Close() })
	return exec.Command("sh", "-c", script), log
}

func output(t *testing.T, log *os.File) string {
	t.Helper()
	b, err := os.ReadFile(log.Name())
	require.NoError(t, err)
	return string(b)
}

// awaitEnd waits until the process has ended, whoever its parent is.
func awaitEnd(t *testing.T, pid string) {
	t.Helper()
	n, err := strconv.Atoi(strings.TrimSpace(pid))
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		stat, err := os.ReadFile("/proc/" + strconv.Itoa(n) + "/stat")
		return errors.Is(unix.Kill(n, 0), unix.ESRCH) || err != nil || strings.Contains(string(stat), ") Z ")
	}, 30*time.Second, 10*time.Millisecond)
}

// What the suite started and left running ends with it.
func TestSuiteEndsWithItsGroup(t *testing.T) {
	t.Parallel()
	cmd, log := sh(t, "sleep 1000 >/dev/null 2>&1 & echo $!; exit 3")
	err := execSuite(t.Context(), cmd, log, options{limit: time.Minute})
	var exit *exec.ExitError
	require.ErrorAs(t, err, &exit)
	require.Equal(t, 3, exit.ExitCode())
	awaitEnd(t, output(t, log))
}

// An interrupted suite gets the signal, and may clean up.
func TestSuiteIsInterrupted(t *testing.T) {
	t.Parallel()
	cmd, log := sh(t, "trap 'echo cleaning; exit 0' INT; echo ready; while :; do sleep 0.05; done")
	ctx, cancel := context.WithCancelCause(t.Context())
	stopped := errors.New("stopped")
	go func() {
		for !strings.Contains(outputOf(log), "ready") {
			time.Sleep(10 * time.Millisecond)
		}
		cancel(stopped)
	}()
	require.ErrorIs(t, execSuite(ctx, cmd, log, options{limit: time.Minute}), stopped)
	require.Equal(t, "ready\ncleaning\n", output(t, log))
}

func outputOf(log *os.File) string {
	b, _ := os.ReadFile(log.Name())
	return string(b)
}
