// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package reap

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	runc "github.com/containerd/go-runc"
	"github.com/stretchr/testify/require"
)

// child is set in the test's own child: reaping would take the children of all
// other tests in this process.
const child = "AGENT_TEST_REAP"

func TestReaper(t *testing.T) {
	if os.Getenv(child) == "" {
		self, err := os.Executable()
		require.NoError(t, err)
		cmd := exec.CommandContext(t.Context(), self, "-test.run=^TestReaper$", "-test.v")
		cmd.Env = append(os.Environ(), child+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		return
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r, err := Start(ctx)
	require.NoError(t, err)
	t.Run("exits", func(t *testing.T) { exits(t, r) })
	t.Run("races", func(t *testing.T) { races(t, r) })
	t.Run("orphans", func(t *testing.T) { orphans(t, r) })
	r.mu.Lock()
	defer r.mu.Unlock()
	require.Empty(t, r.births)
	require.Empty(t, r.watched)
}

// spawn starts a shell script by the Monitor, as go-runc does.
func spawn(t *testing.T, script string) int {
	cmd := exec.Command("sh", "-c", script)
	ec, err := runc.Monitor.Start(cmd)
	require.NoError(t, err)
	go func() { _, _ = runc.Monitor.Wait(cmd, ec) }()
	return cmd.Process.Pid
}

func (r *Reaper) start(t *testing.T, script string, delay time.Duration) Exit {
	b := r.Expect()
	defer b.End()
	pid := spawn(t, script)
	time.Sleep(delay)
	got := make(chan Exit, 1)
	b.Watch(pid, func(e Exit) { got <- e })
	b.End()
	select {
	case e := <-got:
		require.Equal(t, pid, e.Pid)
		require.WithinDuration(t, time.Now(), e.At, time.Minute)
		return e
	case <-time.After(30 * time.Second):
		t.Fatal("the exit was lost")
		return Exit{}
	}
}

func exits(t *testing.T, r *Reaper) {
	require.Equal(t, 3, r.start(t, "exit 3", 0).Status)
	require.Equal(t, 0, r.start(t, "sleep 0.05", 0).Status)
	require.Equal(t, 137, r.start(t, "kill -9 $$", 0).Status)
	require.Equal(t, 143, r.start(t, "kill -15 $$", 0).Status)
	// Long gone when its pid becomes known.
	require.Equal(t, 4, r.start(t, "exit 4", 100*time.Millisecond).Status)
}

func races(t *testing.T, r *Reaper) {
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() {
			if got := r.start(t, fmt.Sprintf("exit %d", i), 0).Status; got != i {
				t.Errorf("exit %d told as %d", i, got)
			}
		})
	}
	wg.Wait()
}

// orphans of a process that has ended become ours, and must not stay as zombies.
func orphans(t *testing.T, r *Reaper) {
	r.start(t, "(sleep 0.1) & (sleep 0.1) & exit 0", 0)
	require.Eventually(t, func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/children", os.Getpid()))
		return err == nil && strings.TrimSpace(string(b)) == ""
	}, 20*time.Second, 5*time.Millisecond)
}
