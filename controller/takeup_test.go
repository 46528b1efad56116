// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// mute makes the driver's VMs answer nothing, or everything again.
func (n *node) mute(mute bool) {
	n.driver.mu.Lock()
	defer n.driver.mu.Unlock()
	n.driver.mute = mute
}

func (n *node) attaches() int {
	n.driver.mu.Lock()
	defer n.driver.mu.Unlock()
	return n.driver.attaches
}

func (n *node) info(id string) Info {
	n.t.Helper()
	st, err := n.Status(n.ctx(), id, true)
	require.NoError(n.t, err)
	var info Info
	require.NoError(n.t, json.Unmarshal([]byte(st.Info[infoKey]), &info))
	return info
}

// newMuteNode has a ready sandbox "a" whose VM lives and does not answer.
func newMuteNode(t *testing.T) *node {
	n := newNode(t)
	n.containers.sandbox["c1"] = "a"
	n.run("a")
	n.cfg.RecoverTimeout = 50 * time.Millisecond
	n.restart(func(n *node) { n.mute(true) })
	return n
}

func TestAVMThatDoesNotAnswerInTimeRunsOn(t *testing.T) {
	n := newMuteNode(t)
	machine := n.driver.only(t)
	require.Eventually(t, func() bool { return n.attaches() >= 2 }, 5*time.Second, time.Millisecond, "it is tried again")
	info := n.info("a")
	require.Equal(t, StateReady, info.State)
	require.Contains(t, info.Pending, "deadline exceeded")
	st, err := n.Status(n.ctx(), "a", false)
	require.NoError(t, err)
	require.Equal(t, ready, st.State)
	require.Equal(t, uint32(machine.pid), st.Pid)
	inst, err := n.Start(n.ctx(), "a")
	require.NoError(t, err)
	require.Equal(t, st.Address, inst.Address)
	_, err = n.Metrics(n.ctx(), "a")
	require.NoError(t, err)

	grow := extension(t, &runtime.LinuxContainerResources{MemoryLimitInBytes: 1 << 30})
	err = n.Update(n.ctx(), "a", grow, "extensions")
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	require.ErrorContains(t, err, "taken up")
	_, err = n.attachRootFS(n.ctx(), "a", "c1")
	require.ErrorIs(t, err, errdefs.ErrUnavailable)

	n.mute(false)
	require.Eventually(t, func() bool { return n.info("a").Pending == "" }, 5*time.Second, time.Millisecond)
	require.Same(t, machine, n.driver.only(t), "the same VM all the time")
	require.NoError(t, n.Update(n.ctx(), "a", grow, "extensions"))
	_, err = n.attachRootFS(n.ctx(), "a", "c1")
	require.NoError(t, err)
	machine.die("of age", false)
	_, err = n.Wait(n.ctx(), "a")
	require.NoError(t, err)
	require.Contains(t, n.info("a").Cause, "of age", "it is watched by its driver now")
	require.NoError(t, n.Shutdown(n.ctx(), "a"))
	n.requireNothing()
}

func TestAVMThatDoesNotAnswerIsWatched(t *testing.T) {
	for name, tc := range map[string]struct {
		end   func(*node)
		cause string
	}{
		"vm":   {func(n *node) { n.driver.only(n.t).die("x", false) }, "the VM ended"},
		"shim": {killShims, "the shim (pid"},
		"stop": {func(n *node) { require.NoError(n.t, n.Stop(n.ctx(), "a")) }, "stopped"},
		"stop, and nobody has hold of it": {func(n *node) {
			p, err := n.get("a")
			require.NoError(n.t, err)
			p.mu.Lock()
			held := p.held
			p.held = nil
			p.mu.Unlock()
			require.NoError(n.t, held.Close())
			require.NoError(n.t, n.Stop(n.ctx(), "a"))
		}, "stopped"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newMuteNode(t)
			require.Equal(t, 1, n.driver.running())
			tc.end(n)
			_, err := n.Wait(n.ctx(), "a")
			require.NoError(t, err)
			state, cause := n.status("a")
			require.Equal(t, notReady, state)
			require.Contains(t, cause, tc.cause)
			n.requireNoMachines()
			require.NoError(t, n.Shutdown(n.ctx(), "a"))
			n.requireNothing()
		})
	}
}

// Whatever else keeps a VM from being taken up ends it: it would be ready for ever,
// and watched by nobody.
func TestAVMThatCannotBeTakenUpIsEnded(t *testing.T) {
	for name, tc := range map[string]struct {
		during func(*node)
		cause  string
	}{
		"refused":        {func(n *node) { n.driver.attachErr = errdefs.ErrUnavailable }, "the VM cannot be taken up"},
		"unknown driver": {func(n *node) { rewrite(n, "a", func(r *record) { r.VM.Driver = "other" }) }, "other's, which this build does not know"},
		"after a while": {func(n *node) {
			n.cfg.RecoverTimeout = 50 * time.Millisecond
			n.mute(true)
			n.driver.attachErr = errdefs.ErrInvalidArgument
		}, "the VM cannot be taken up"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.run("a")
			n.restart(tc.during)
			n.mute(false)
			_, err := n.Wait(n.ctx(), "a")
			require.NoError(t, err)
			state, cause := n.status("a")
			require.Equal(t, notReady, state)
			require.Contains(t, cause, tc.cause)
			n.requireNoMachines()
			require.NoError(t, n.Shutdown(n.ctx(), "a"))
			n.requireNothing()
		})
	}
}

func TestAnotherProcessWithTheVMsPidIsLeftAlone(t *testing.T) {
	n := newNode(t)
	n.run("a")
	machine := n.driver.only(t)
	rewrite(n, "a", func(r *record) { r.VM.StartTime++ })
	n.restart()
	state, cause := n.status("a")
	require.Equal(t, notReady, state)
	require.Contains(t, cause, "the VM ended while containerd was away")
	require.NoError(t, n.Shutdown(n.ctx(), "a"))
	require.False(t, isClosed(machine.done))
	machine.die("test ends", false)
	n.requireNothing()
}

// After the host has booted nothing is taken for alive by its PID and start time, which another
// process may have by then, and what was the pods' is removed.
func TestRecoverAfterABoot(t *testing.T) {
	n := newNode(t)
	shim := n.run("a").snapshot().Shim.Pid
	machine := n.driver.only(t)
	rewrite(n, "a", func(r *record) { r.VM.BootID, r.Shim.BootID = "another", "another" })
	n.restart()
	state, cause := n.status("a")
	require.Equal(t, notReady, state)
	require.Contains(t, cause, "ended while containerd was away")
	require.False(t, isClosed(machine.done), "the process that has the VM's PID now")
	require.NoError(t, n.Stop(n.ctx(), "a"))
	require.NoError(t, n.Shutdown(n.ctx(), "a"))
	require.NoDirExists(t, filepath.Join(n.cfg.StateDir, "a"))
	require.NoError(t, syscall.Kill(shim, syscall.SIGKILL), "the process that has the shim's PID now")
	machine.die("test ends", false)
	n.requireNothing()
}

// All are known and watched in time, however many do not answer.
func TestManyVMsThatDoNotAnswer(t *testing.T) {
	n := newNode(t)
	const pods = recoverParallel + 4
	for i := range pods {
		n.run(fmt.Sprint("a", i))
	}
	n.cfg.RecoverTimeout = 200 * time.Millisecond
	n.mute(true)
	begin := time.Now()
	n.restart()
	require.Less(t, time.Since(begin), 2*n.cfg.RecoverTimeout, "one limit for all, with some left to be begun")
	for i := range pods {
		state, _ := n.status(fmt.Sprint("a", i))
		require.Equal(t, ready, state)
	}
	require.Equal(t, pods, n.driver.running())
	n.mute(false)
	for i := range pods {
		id := fmt.Sprint("a", i)
		p, err := n.get(id)
		require.NoError(t, err)
		require.Eventually(t, func() bool { return p.handle() != nil }, 5*time.Second, time.Millisecond)
		require.NoError(t, n.Shutdown(n.ctx(), id))
	}
	n.requireNothing()
}
