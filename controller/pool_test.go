// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/controller/config"
	"github.com/cloudhv/containerd-cloudhv/vmpool"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// poolNode is a node whose controller has a pool. The scratch store has its
// template, as not every host can make it.
func poolNode(t *testing.T, least, most int) *node {
	t.Helper()
	n := newNode(t)
	for _, path := range []*string{&n.cfg.Kernel, &n.cfg.Image} {
		*path = filepath.Join(n.cfg.CacheDir, filepath.Base(*path))
		require.NoError(t, os.WriteFile(*path, []byte(*path), 0o600))
	}
	n.cfg.Pool = config.PoolSettings{
		Restore: true, Min: least, Max: most, MaxMemory: 1 << 40, Parallel: 2, WarmUp: config.WarmUpAlways,
		Horizon: time.Minute, Window: time.Second, TemplateDir: filepath.Join(n.cfg.CacheDir, "templates"),
	}
	n.openPool()
	// Before the node's own end, which wants nothing left.
	t.Cleanup(func() {
		for _, p := range n.all() {
			require.NoError(t, n.Shutdown(n.ctx(), p.id))
		}
		n.pool.Drain()
		require.Eventually(t, func() bool { s, _ := n.PoolStatus(); return s.Ready+s.Making == 0 }, 10*time.Second, time.Millisecond)
		require.NoError(t, n.Close())
		n.requireNoMachines()
	})
	return n
}

// openPool starts the pool as the plugin does.
func (n *node) openPool() {
	n.t.Helper()
	n.Controller = n.controller()
	n.Controller.host.Binary = n.cfg.Kernel
	require.NoError(n.t, n.OpenPool())
	require.NoError(n.t, n.Recover(n.t.Context()))
}

func (n *node) awaitPool(what string, f func(vmpool.Status) bool) {
	n.t.Helper()
	require.Eventually(n.t, func() bool { s, _ := n.PoolStatus(); return f(s) }, 10*time.Second, time.Millisecond, what)
}

func TestASandboxTakesAReadyVM(t *testing.T) {
	n := poolNode(t, 1, 1)
	n.awaitPool("a VM is ready", func(s vmpool.Status) bool { return s.Ready == 1 })
	ready := n.driver.only(t)
	assert.Len(t, ready.warmed, 1)
	assert.Len(t, ready.rehearsed, 1)
	assert.Equal(t, vmm.BuiltInMAC, ready.rehearsed[0].GetBuiltInMac())
	p := n.run("a")
	rec := p.snapshot()
	assert.Equal(t, "hit", rec.Outcome)
	assert.Equal(t, ready.pid, rec.VM.Pid)
	assert.Equal(t, "a", ready.configured.GetPodId())
	assert.NotEmpty(t, rec.Snapshot)
	assert.Equal(t, "6.12", rec.Guest.Kernel)
	info := n.Controller.info(p, &rec)
	assert.Equal(t, "hit", info.Outcome)
	assert.Equal(t, rec.VM.Dir, filepath.Dir(info.ConsoleLog))
	require.FileExists(t, rec.Scratch)
	n.awaitPool("the pool is filled again", func(s vmpool.Status) bool { return s.Ready == 1 })

	require.NoError(t, n.Stop(n.ctx(), "a"))
	assert.NoFileExists(t, rec.Scratch, "its disk goes at once")
	assert.DirExists(t, rec.VM.Dir, "its logs stay until it is removed")
	require.NoError(t, n.Shutdown(n.ctx(), "a"))
	assert.NoDirExists(t, rec.VM.Dir)
}

func TestASandboxOfAnEmptyPoolIsRestored(t *testing.T) {
	n := poolNode(t, 0, 0)
	n.awaitPool("the snapshot is made", func(s vmpool.Status) bool { return s.Usable })
	assert.Equal(t, "miss", n.run("a").snapshot().Outcome)
	n.pool.Drain()
	require.NoError(t, os.Rename(n.cfg.Pool.TemplateDir, filepath.Join(t.TempDir(), "gone")))
	assert.Empty(t, n.run("b").snapshot().Outcome, "it boots where nothing can be restored")
}

// A controller that comes after another finds whose the VMs are.
func TestRecoveryTellsPodsVMsFromReadyOnes(t *testing.T) {
	n := poolNode(t, 1, 1)
	n.awaitPool("a VM is ready", func(s vmpool.Status) bool { return s.Ready == 1 })
	pod := n.run("a").snapshot()
	n.awaitPool("the pool is filled again", func(s vmpool.Status) bool { return s.Ready == 1 })
	require.Len(t, n.machines(), 2)
	n.letGo()
	require.NoError(t, n.Close())
	n.openPool()
	n.awaitPool("the ready one is adopted", func(s vmpool.Status) bool { return s.Ready == 1 })
	require.Len(t, n.machines(), 2)
	p, err := n.get("a")
	require.NoError(t, err)
	assert.Equal(t, pod.VM.Pid, p.snapshot().VM.Pid)
	assert.Equal(t, StateReady, p.snapshot().State)
	next := n.run("b").snapshot()
	assert.Equal(t, "hit", next.Outcome)
	assert.NotEqual(t, pod.VM.Pid, next.VM.Pid)
}

// The throw-away container's spec is one that a runtime takes.
func TestWarmUpSpec(t *testing.T) {
	t.Parallel()
	data, err := warmUpSpec()
	require.NoError(t, err)
	var spec specs.Spec
	require.NoError(t, json.Unmarshal(data, &spec))
	assert.Equal(t, "1.0.2", spec.Version)
	assert.NotNil(t, spec.Linux.Seccomp)
	assert.NotEmpty(t, spec.Mounts)
}
