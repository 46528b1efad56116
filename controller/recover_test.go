// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/vmpool/process"
)

// status is the state that CRI sees, and the cause.
func (n *node) status(id string) (string, string) {
	n.t.Helper()
	st, err := n.Status(n.ctx(), id, true)
	require.NoError(n.t, err)
	var info Info
	require.NoError(n.t, json.Unmarshal([]byte(st.Info[infoKey]), &info))
	return st.State, info.Cause
}

func TestARunningSandboxSurvivesContainerd(t *testing.T) {
	n := newNode(t)
	n.containers.sandbox["c1"] = "a"
	old := n.run("a")
	_, err := n.attachRootFS(n.ctx(), "a", "c1")
	require.NoError(t, err)
	before, err := n.Status(n.ctx(), "a", false)
	require.NoError(t, err)
	for range 3 {
		n.restart()
		after, err := n.Status(n.ctx(), "a", false)
		require.NoError(t, err)
		require.Equal(t, before, after)
		require.Equal(t, 1, n.driver.running())
		require.Len(t, n.images.pins, 1)
	}
	p, err := n.get("a")
	require.NoError(t, err)
	require.Equal(t, old.shim.id, p.shim.id)
	_, err = n.attachRootFS(n.ctx(), "a", "c1")
	require.NoError(t, err)
	require.Len(t, n.driver.only(t).disks, 1)

	n.driver.only(t).die("killed", false)
	_, err = n.Wait(n.ctx(), "a")
	require.NoError(t, err)
	state, cause := n.status("a")
	require.Equal(t, notReady, state)
	require.Contains(t, cause, "the VM ended")
	require.NoError(t, n.Shutdown(n.ctx(), "a"))
	n.requireNothing()
}

func TestWhatHappenedWhileContainerdWasAway(t *testing.T) {
	for name, tc := range map[string]struct {
		before func(*node)
		during func(*node)
		cause  string
		// gone is true if the sandbox is not to be known any more.
		gone bool
	}{
		"created only": {func(n *node) { require.NoError(n.t, n.create("a")) }, nil, "before the sandbox was started", false},
		"vm ended":     {runA, func(n *node) { n.driver.only(n.t).die("x", false) }, "the VM ended while containerd was away", false},
		"shim ended":   {runA, killShims, "the shim ended while containerd was away", false},
		"both ended": {runA, func(n *node) {
			n.driver.only(n.t).die("x", false)
			killShims(n)
		}, "the VM ended while containerd was away", false},
		"stopped before": {func(n *node) {
			runA(n)
			require.NoError(n.t, n.Stop(n.ctx(), "a"))
		}, nil, "stopped", false},
		"while starting": {runA, func(n *node) {
			rewrite(n, "a", func(r *record) { r.State, r.VM, r.Shim = StateStarting, nil, nil })
		}, "while the sandbox was started", false},
		"while stopping":        {runA, func(n *node) { rewrite(n, "a", func(r *record) { r.State = StateStopping }) }, "stopped", false},
		"removed by containerd": {runA, func(n *node) { n.sandboxes.known = map[string]bool{} }, "", true},
		"store cannot be read": {runA, func(n *node) {
			n.sandboxes.err = errors.New("bolt")
			n.driver.only(n.t).die("x", false)
		}, "the VM ended while containerd was away", false},
		"cannot be attached": {runA, func(n *node) {
			n.driver.attachErr = errdefs.ErrUnavailable
			n.driver.only(n.t).die("x", false)
		}, "the VM ended while containerd was away", false},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			tc.before(n)
			if tc.during != nil {
				n.restart(tc.during)
			} else {
				n.restart()
			}
			if tc.gone {
				_, err := n.Status(n.ctx(), "a", false)
				require.ErrorIs(t, err, errdefs.ErrNotFound)
				n.requireNothing()
				return
			}
			state, cause := n.status("a")
			require.Equal(t, notReady, state)
			require.Contains(t, cause, tc.cause)
			_, err := n.Wait(n.ctx(), "a")
			require.NoError(t, err)
			require.Zero(t, n.net.count())
			if name == "while starting" {
				n.driver.only(t).die("the stray would have been killed by its command line", false)
			}
			n.requireNoMachines()
			n.restart()
			_, again := n.status("a")
			require.Equal(t, cause, again, "the cause survives too")
			require.NoError(t, n.Stop(n.ctx(), "a"))
			require.NoError(t, n.Shutdown(n.ctx(), "a"))
			n.requireNothing()
		})
	}
}

func runA(n *node) { n.run("a") }

func killShims(n *node) {
	for _, pid := range n.findProcesses([]string{n.cfg.StateDir}) {
		require.NoError(n.t, unix.Kill(pid, unix.SIGKILL))
		require.Eventually(n.t, func() bool {
			_, err := process.Identify(pid)
			return err != nil
		}, 5*time.Second, time.Millisecond)
	}
}

// rewrite changes a record on disk, as an earlier containerd would have left it.
func rewrite(n *node, id string, change func(*record)) {
	dir := filepath.Join(n.cfg.StateDir, id)
	r, err := loadRecord(dir)
	require.NoError(n.t, err)
	change(r)
	require.NoError(n.t, r.save(dir))
}

func TestADamagedRecordCostsOnlyItsPod(t *testing.T) {
	for name, content := range map[string]string{
		"empty":      "",
		"cut off":    `{"version":1,"id":"a"`,
		"no json":    "\x00\x01",
		"version":    `{"version":99,"id":"a","namespace":"n","state":"ready"}`,
		"another id": `{"version":1,"id":"b","namespace":"n","state":"ready"}`,
		"state":      `{"version":1,"id":"a","namespace":"n","state":"flying"}`,
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.run("a")
			n.run("b")
			for _, m := range n.machines() {
				if m.cfg.ID == "a" {
					defer m.die("a VMM is killed by its command line", false)
				}
			}
			require.NoError(t, os.WriteFile(filepath.Join(n.cfg.StateDir, "a", recordFile), []byte(content), 0o600))
			n.restart()
			_, err := n.Status(n.ctx(), "a", false)
			require.ErrorIs(t, err, errdefs.ErrNotFound)
			kept, err := os.ReadFile(filepath.Join(n.cfg.StateDir, damagedDir, "a.json"))
			require.NoError(t, err)
			require.Equal(t, content, string(kept))
			require.NoDirExists(t, filepath.Join(n.cfg.StateDir, "a"))
			state, _ := n.status("b")
			require.Equal(t, ready, state)
			require.Len(t, n.findProcesses([]string{n.cfg.StateDir}), 1, "the shim of a is gone")
			require.NoError(t, n.Shutdown(n.ctx(), "b"))
		})
	}
}

func TestWhatNoRecordClaims(t *testing.T) {
	n := newNode(t)
	n.run("b")
	require.NoError(t, os.Mkdir(filepath.Join(n.cfg.StateDir, "empty"), 0o700))
	require.NoError(t, os.Mkdir(filepath.Join(n.cfg.StateDir, "lost+found"), 0o700))
	stray := filepath.Join(n.cfg.CacheDir, scratchDir, "gone"+scratchSuffix)
	require.NoError(t, os.WriteFile(stray, nil, 0o600))
	tmp := filepath.Join(n.cfg.CacheDir, scratchDir, ".template-123")
	require.NoError(t, os.WriteFile(tmp, nil, 0o600))
	shim := exec.Command(n.cfg.Shim, "-sandbox", filepath.Join(n.cfg.StateDir, "gone"))
	require.NoError(t, shim.Start())
	foreign := exec.Command("sleep", "1000")
	foreign.Args = []string{"sleep", "1000", filepath.Join(n.cfg.StateDir, "gone")}
	foreign.Args = []string{filepath.Join(n.cfg.StateDir, "gone"), "1000"}
	require.NoError(t, foreign.Start())
	t.Cleanup(func() {
		_ = foreign.Process.Kill()
		_ = foreign.Wait()
	})
	n.restart()
	require.Error(t, shim.Wait(), "it was killed")
	require.NoError(t, foreign.Process.Signal(unix.Signal(0)), "another program is none of our business")
	require.NoDirExists(t, filepath.Join(n.cfg.StateDir, "empty"))
	require.DirExists(t, filepath.Join(n.cfg.StateDir, "lost+found"), "no sandbox has such a name")
	require.NoError(t, os.Remove(filepath.Join(n.cfg.StateDir, "lost+found")))
	require.NoFileExists(t, stray)
	require.NoFileExists(t, tmp)
	require.FileExists(t, n.scratch.templatePath())
	state, _ := n.status("b")
	require.Equal(t, ready, state)
	require.FileExists(t, n.scratch.path("b"))
	require.NoError(t, n.Shutdown(n.ctx(), "b"))
	n.requireNothing()
}

func TestRecoverIsBounded(t *testing.T) {
	n := newNode(t)
	for _, id := range []string{"a", "b", "c"} {
		n.run(id)
		rewrite(n, id, func(r *record) { r.State = StateStopping })
	}
	n.cfg.RecoverTimeout = 200 * time.Millisecond
	n.net.disconnectErr = 3
	begin := time.Now()
	n.restart()
	require.Less(t, time.Since(begin), 5*time.Second)
	for _, id := range []string{"a", "b", "c"} {
		state, _ := n.status(id)
		require.Equal(t, notReady, state)
		require.NoError(t, n.Shutdown(n.ctx(), id), "tried again")
	}
	n.requireNothing()
}

func TestRecoverOnAFreshHost(t *testing.T) {
	n := newNode(t)
	require.NoError(t, os.RemoveAll(n.cfg.StateDir))
	require.NoError(t, n.Recover(t.Context()))
	n.cfg.StateDir = filepath.Join(n.cfg.CacheDir, "file")
	require.NoError(t, os.WriteFile(n.cfg.StateDir, nil, 0o600))
	require.Error(t, n.Recover(t.Context()))
	require.NoError(t, os.Remove(n.cfg.StateDir))
}

func TestRecordsKeepEverything(t *testing.T) {
	n := newNode(t)
	n.containers.sandbox["c1"] = "a"
	p := n.run("a")
	_, err := n.attachRootFS(n.ctx(), "a", "c1")
	require.NoError(t, err)
	got, err := loadRecord(p.dir)
	require.NoError(t, err)
	want := p.snapshot()
	require.Equal(t, &want, got)
	_, err = loadRecord(t.TempDir())
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.NoError(t, os.Remove(p.file(recordFile)))
	require.NoError(t, os.Symlink("/etc/passwd", p.file(recordFile)))
	_, err = loadRecord(p.dir)
	require.ErrorIs(t, err, errdefs.ErrDataLoss)
}

func TestNamesPath(t *testing.T) {
	t.Parallel()
	for cmdline, want := range map[string]bool{
		"shim\x00-sandbox\x00/run/cloudhv/a":          true,
		"shim\x00-sandbox\x00/run/cloudhv/a/":         true,
		"qemu\x00-blockdev\x00file=/run/cloudhv/a,ro": true,
		"qemu\x00/run/cloudhv/ab,/run/cloudhv/a/x":    true,
		"qemu\x00/run/cloudhv/ab":                     false,
		"qemu\x00/run/cloudhv":                        false,
		"":                                            false,
		"qemu\x00/run/cloud\x00hv/a":                  false,
	} {
		require.Equal(t, want, namesPath([]byte(cmdline), "/run/cloudhv/a"), "%q", cmdline)
	}
}
