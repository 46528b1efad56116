// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	shimapi "github.com/cloudhv/containerd-cloudhv/controller/shim"
	"github.com/cloudhv/containerd-cloudhv/vmpool/process"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

const (
	ready    = "SANDBOX_READY"
	notReady = "SANDBOX_NOTREADY"
)

func TestTransitions(t *testing.T) {
	t.Parallel()
	states := []State{StateCreated, StateStarting, StateReady, StateStopping, StateStopped}
	allowed := map[[2]State]bool{
		{StateCreated, StateStarting}:  true,
		{StateCreated, StateStopping}:  true,
		{StateCreated, StateStopped}:   true,
		{StateStarting, StateReady}:    true,
		{StateStarting, StateStopping}: true,
		{StateReady, StateStopping}:    true,
		{StateStopping, StateStopped}:  true,
	}
	require.Len(t, transitions, len(states))
	for _, from := range states {
		for _, to := range states {
			err := from.to(to)
			if from == to || allowed[[2]State{from, to}] {
				require.NoError(t, err, "%s to %s", from, to)
				continue
			}
			require.ErrorIs(t, err, errdefs.ErrFailedPrecondition, "%s to %s", from, to)
			var te *TransitionError
			require.ErrorAs(t, err, &te)
			require.Equal(t, TransitionError{from, to}, *te)
		}
	}
	require.False(t, State("").valid())
	require.False(t, State("dead").valid())
}

func TestLifeOfASandbox(t *testing.T) {
	n := newNode(t)
	require.NoError(t, n.create("a"))
	st, err := n.Status(n.ctx(), "a", false)
	require.NoError(t, err)
	require.Equal(t, notReady, st.State)
	require.Empty(t, st.Address)

	inst, err := n.Start(n.ctx(), "a")
	require.NoError(t, err)
	m := n.driver.only(t)
	require.Equal(t, uint32(m.pid), inst.Pid)
	require.Equal(t, "ttrpc+unix://"+filepath.Join(n.cfg.StateDir, "a", shimapi.SocketFile), inst.Address)
	require.Equal(t, uint32(3), inst.Version)
	require.Equal(t, []string{"nic1"}, m.nics)
	require.Equal(t, vmm.Size{VCPUs: 1, MemoryBytes: 256 << 20}, m.size)
	require.Equal(t, vmm.Size{VCPUs: 1, MemoryBytes: 128 << 20}, m.cfg.Size)
	require.Equal(t, vmm.Size{VCPUs: 4, MemoryBytes: 2 << 30}, m.cfg.Max)
	require.Equal(t, "host-of-a", m.configured.GetHostname())
	require.Equal(t, "eth0", m.configured.GetInterfaces()[0].GetName())
	require.Len(t, m.configured.GetEntropy(), entropyBytes)
	require.Len(t, m.configured.GetMachineId(), 32)
	require.WithinDuration(t, time.Now(), m.configured.GetClock().AsTime(), time.Minute)
	require.Equal(t, "0", m.configured.GetSysctls()["net.ipv4.ip_unprivileged_port_start"])

	again, err := n.Start(n.ctx(), "a")
	require.NoError(t, err)
	require.Equal(t, inst, again)

	st, err = n.Status(n.ctx(), "a", true)
	require.NoError(t, err)
	require.Equal(t, ready, st.State)
	require.Equal(t, inst.Pid, st.Pid)
	require.Equal(t, inst.Address, st.Address)
	var info Info
	require.NoError(t, json.Unmarshal([]byte(st.Info[infoKey]), &info))
	require.Equal(t, "none", info.Accelerator)
	require.Equal(t, "a test", info.AcceleratorReason)
	require.Equal(t, "a test has no other", info.HypervisorReason)
	require.Empty(t, info.Pending)
	require.Equal(t, "test?[31m", info.GuestAgent, "no escape sequences from a guest")
	require.NotEmpty(t, info.Phases)
	for _, p := range info.Phases {
		require.LessOrEqual(t, p.TookUsec, time.Hour.Microseconds(), p.Name)
	}
	var cfg shimapi.Config
	data, err := os.ReadFile(filepath.Join(n.cfg.StateDir, "a", shimapi.ConfigFile))
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(data, &cfg))
	require.Equal(t, shimapi.Config{
		SandboxID: "a", Namespace: testNamespace, SandboxPid: inst.Pid, TTRPCAddress: "/run/x.ttrpc",
		GuestEndpoint: "serial+unix://" + filepath.Join(n.cfg.StateDir, "a", "pod.sock"), Forwards: 1,
	}, cfg)

	exits := make(chan sandbox.ExitStatus, 1)
	go func() {
		e, err := n.Wait(n.ctx(), "a")
		if err != nil {
			t.Error(err)
		}
		exits <- e
	}()
	require.NoError(t, n.Stop(n.ctx(), "a"))
	exit := <-exits
	require.Zero(t, exit.ExitStatus)
	require.WithinDuration(t, time.Now(), exit.ExitedAt, time.Minute)
	require.Zero(t, n.net.count())
	st, err = n.Status(n.ctx(), "a", false)
	require.NoError(t, err)
	require.Equal(t, notReady, st.State)
	require.Zero(t, st.Pid)
	require.Equal(t, inst.Address, st.Address, "the shim still tells how containers ended")
	require.False(t, isClosed(n.shimOf("a").done()))

	require.NoError(t, n.Stop(n.ctx(), "a"))
	require.NoError(t, n.Shutdown(n.ctx(), "a"))
	require.NoError(t, n.Shutdown(n.ctx(), "a"))
	require.NoError(t, n.Stop(n.ctx(), "a"))
	_, err = n.Status(n.ctx(), "a", false)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	_, err = n.Wait(n.ctx(), "a")
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	n.requireNothing()
}

func (n *node) shimOf(id string) *shim {
	p, err := n.get(id)
	require.NoError(n.t, err)
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.shim
}

// CRI calls nothing after a Start that failed: it undoes Create too.
func TestAFailedStartLeavesNothing(t *testing.T) {
	for name, tc := range map[string]struct {
		inject func(*node)
		want   error
		text   string
	}{
		"network":          {func(n *node) { n.net.err = errInjected }, errInjected, "pod network"},
		"scratch":          {func(n *node) { n.scratch.size = 1 }, errdefs.ErrFailedPrecondition, "mkfs.ext4"},
		"boot":             {func(n *node) { n.driver.bootErr = errInjected }, errInjected, "start the VM"},
		"no shim":          {func(n *node) { n.cfg.Shim = "/nonexistent/shim" }, errdefs.ErrFailedPrecondition, "start shim"},
		"shim not on path": {func(n *node) { n.cfg.Shim = "no-such-shim" }, errdefs.ErrFailedPrecondition, "find the shim"},
		"guest dies":       {func(n *node) { n.driver.vm.dieInBoot = true }, errdefs.ErrUnavailable, "wait for the guest"},
		"agent fails":      {func(n *node) { n.driver.agent.info = errdefs.ErrInternal }, errdefs.ErrInternal, "wait for the guest"},
		"agent is silent": {func(n *node) {
			n.driver.agent.silentInfo, n.cfg.BootTimeout = true, 100*time.Millisecond
		}, context.DeadlineExceeded, "wait for the guest"},
		"agent of another build": {func(n *node) { n.driver.agent.version = 999 }, errdefs.ErrFailedPrecondition, "version 999"},
		"nic":                    {func(n *node) { n.driver.vm.nic = errInjected }, errInjected, "nic1"},
		"resize":                 {func(n *node) { n.driver.vm.resize = errInjected }, errInjected, "as large as the pod"},
		"configure":              {func(n *node) { n.driver.agent.configure = errdefs.ErrInvalidArgument }, errdefs.ErrInvalidArgument, "configure the guest"},
		"configure is silent": {func(n *node) {
			n.driver.agent.silentConfigure, n.cfg.AgentTimeout = true, 100*time.Millisecond
		}, context.DeadlineExceeded, "configure the guest"},
		"record cannot be written": {func(n *node) {
			require.NoError(t, os.RemoveAll(filepath.Join(n.cfg.StateDir, "a")))
		}, errdefs.ErrInternal, "record"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			require.NoError(t, n.create("a"))
			tc.inject(n)
			_, err := n.Start(n.ctx(), "a")
			require.ErrorIs(t, err, tc.want)
			require.ErrorContains(t, err, tc.text)
			n.requireNothing()
			_, err = n.Status(n.ctx(), "a", false)
			require.ErrorIs(t, err, errdefs.ErrNotFound)
		})
	}
}

func TestAStartWhoseCallerLeaves(t *testing.T) {
	n := newNode(t)
	n.driver.agent.slowConfigure = 200 * time.Millisecond
	require.NoError(t, n.create("a"))
	ctx, cancel := context.WithTimeout(n.ctx(), 100*time.Millisecond)
	defer cancel()
	_, err := n.Start(ctx, "a")
	require.ErrorIs(t, err, context.DeadlineExceeded)
	n.requireNothing()
}

func TestStopDuringAStart(t *testing.T) {
	for name, stop := range map[string]func(*node) error{
		"stop":     func(n *node) error { return n.Stop(n.ctx(), "a") },
		"shutdown": func(n *node) error { return n.Shutdown(n.ctx(), "a") },
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.driver.agent.silentInfo = true
			require.NoError(t, n.create("a"))
			result := make(chan error, 1)
			go func() {
				_, err := n.Start(n.ctx(), "a")
				result <- err
			}()
			require.Eventually(t, func() bool { return n.driver.running() == 1 }, 5*time.Second, time.Millisecond)
			begin := time.Now()
			require.NoError(t, stop(n))
			require.Less(t, time.Since(begin), 5*time.Second, "it does not wait for the guest")
			require.ErrorIs(t, <-result, errdefs.ErrAborted)
			n.requireNothing()
			_, err := n.Start(n.ctx(), "a")
			require.ErrorIs(t, err, errdefs.ErrNotFound)
		})
	}
}

func TestStopBeforeStart(t *testing.T) {
	n := newNode(t)
	require.NoError(t, n.create("a"))
	require.NoError(t, n.Stop(n.ctx(), "a"))
	require.NoError(t, n.Stop(n.ctx(), "a"))
	_, err := n.Start(n.ctx(), "a")
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	_, err = n.Wait(n.ctx(), "a")
	require.NoError(t, err)
	require.NoError(t, n.Shutdown(n.ctx(), "a"))
	n.requireNothing()
}

func TestVerbsOnAnUnknownSandbox(t *testing.T) {
	n := newNode(t)
	require.NoError(t, n.Stop(n.ctx(), "a"))
	require.NoError(t, n.Shutdown(n.ctx(), "a"))
	_, startErr := n.Start(n.ctx(), "a")
	_, statusErr := n.Status(n.ctx(), "a", true)
	_, waitErr := n.Wait(n.ctx(), "a")
	_, platformErr := n.Platform(n.ctx(), "a")
	_, metricsErr := n.Metrics(n.ctx(), "a")
	for _, err := range []error{
		startErr, statusErr, waitErr, platformErr, metricsErr, n.Update(n.ctx(), "a", sandbox.Sandbox{}),
	} {
		require.ErrorIs(t, err, errdefs.ErrNotFound)
	}
}

func TestAVMThatDies(t *testing.T) {
	n := newNode(t)
	p := n.run("a")
	n.driver.only(t).die("killed by signal 9", false)
	exit, err := n.Wait(n.ctx(), "a")
	require.NoError(t, err)
	require.Equal(t, uint32(exitKilled), exit.ExitStatus)
	require.Zero(t, n.net.count(), "CRI removes the namespace now")
	st, err := n.Status(n.ctx(), "a", true)
	require.NoError(t, err)
	require.Equal(t, notReady, st.State)
	require.Contains(t, st.Info[infoKey], "the VM ended: killed by signal 9")
	require.False(t, isClosed(p.shim.done()), "the shim tells how the containers ended")
	_, err = n.Metrics(n.ctx(), "a")
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	require.ErrorContains(t, err, "killed by signal 9")
	require.NoError(t, n.Stop(n.ctx(), "a"))
	require.NoError(t, n.Shutdown(n.ctx(), "a"))
	n.requireNothing()
}

func TestAShimThatDies(t *testing.T) {
	n := newNode(t)
	p := n.run("a")
	require.NoError(t, unix.Kill(p.shim.id.Pid, unix.SIGKILL))
	exit, err := n.Wait(n.ctx(), "a")
	require.NoError(t, err)
	require.Equal(t, uint32(exitKilled), exit.ExitStatus)
	st, err := n.Status(n.ctx(), "a", true)
	require.NoError(t, err)
	require.Equal(t, notReady, st.State)
	require.Contains(t, st.Info[infoKey], "the shim (pid")
	require.Zero(t, n.driver.running())
	require.NoError(t, n.Shutdown(n.ctx(), "a"))
	n.requireNothing()
}

// Whoever ends a sandbox because its guest hangs finds why the shim gave it up;
// that the connection ended with the VM is no news.
func TestCauseOfALostGuest(t *testing.T) {
	const stopped = "stopped"
	for name, tc := range map[string]struct {
		lost string
		end  func(*node)
		want string
	}{
		"not lost": {"", nil, stopped},
		"lost":     {"the guest \"x\"\x1b[31m is silent\n", nil, stopped + `; the shim gave up the guest before: "the guest \"x\"?[31m is silent"`},
		"too long": {strings.Repeat("x", 1<<20), nil, stopped + `; the shim gave up the guest before: "` + strings.Repeat("x", maxLoss) + `"`},
		"the VM ended": {"the connection to the VM has ended\n", func(n *node) {
			n.driver.only(t).die("killed by signal 9", false)
		}, "the VM ended: killed by signal 9"},
		"the shim ended": {"the guest is silent\n", func(n *node) {
			require.NoError(t, unix.Kill(n.shimOf("a").id.Pid, unix.SIGKILL))
		}, `; the shim gave up the guest before: "the guest is silent"`},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			p := n.run("a")
			if tc.lost != "" {
				require.NoError(t, os.WriteFile(p.file(shimapi.VMLostFile), []byte(tc.lost), 0o600))
			}
			if tc.end == nil {
				require.NoError(t, n.Stop(n.ctx(), "a"))
			} else {
				tc.end(n)
				_, err := n.Wait(n.ctx(), "a")
				require.NoError(t, err)
			}
			st, err := n.Status(n.ctx(), "a", true)
			require.NoError(t, err)
			var info Info
			require.NoError(t, json.Unmarshal([]byte(st.Info[infoKey]), &info))
			if strings.HasPrefix(tc.want, ";") {
				require.True(t, strings.HasSuffix(info.Cause, tc.want), info.Cause)
				return
			}
			require.Equal(t, tc.want, info.Cause)
		})
	}
}

// A guest that answers nothing is killed when its time is up, and holds up
// nobody until then.
func TestASilentGuest(t *testing.T) {
	n := newNode(t)
	n.cfg.PowerOffTimeout = 500 * time.Millisecond
	n.driver.agent.silentPowerOff = true
	n.run("a")
	stopped := make(chan error, 1)
	go func() { stopped <- n.Stop(n.ctx(), "a") }()
	n.driver.agent.silentPowerOff = false
	begin := time.Now()
	n.run("b")
	_, err := n.Status(n.ctx(), "a", true)
	require.NoError(t, err)
	_, err = n.Metrics(n.ctx(), "a")
	if err != nil {
		require.ErrorIs(t, err, errdefs.ErrUnavailable)
	}
	require.NoError(t, n.Shutdown(n.ctx(), "b"))
	t.Log("another sandbox meanwhile took", time.Since(begin))
	require.NoError(t, <-stopped)
	require.Less(t, time.Since(begin), 8*time.Second)
}

// A guest that has answered that all is written back need not be waited for.
func TestAGuestThatTakesItsTimeToTurnItselfOff(t *testing.T) {
	n := newNode(t)
	n.cfg.PowerOffTimeout = time.Minute
	n.driver.agent.lingers = true
	n.run("a")
	begin := time.Now()
	require.NoError(t, n.Stop(n.ctx(), "a"))
	require.Less(t, time.Since(begin), 30*time.Second)
	require.Equal(t, "stopped", n.info("a").Cause)
	require.NoError(t, n.Shutdown(n.ctx(), "a"))
	n.requireNothing()
}

func TestAnEndingThatFailsIsTriedAgain(t *testing.T) {
	n := newNode(t)
	n.run("a")
	n.driver.agent.silentPowerOff = true
	n.driver.only(t).agent.silentPowerOff = true
	n.cfg.PowerOffTimeout = 50 * time.Millisecond
	n.driver.vm.kill.Store(1)
	n.net.disconnectErr = 1
	err := n.Stop(n.ctx(), "a")
	require.ErrorIs(t, err, errInjected)
	require.ErrorContains(t, err, "still runs")
	st, err := n.Status(n.ctx(), "a", false)
	require.NoError(t, err)
	require.Equal(t, notReady, st.State)
	require.NoError(t, n.Stop(n.ctx(), "a"))
	require.NoError(t, n.Shutdown(n.ctx(), "a"))
	n.requireNothing()
}

func TestAStopWhoseCallerLeavesGoesOn(t *testing.T) {
	n := newNode(t)
	n.cfg.PowerOffTimeout = 300 * time.Millisecond
	n.driver.agent.silentPowerOff = true
	n.run("a")
	short := 50 * time.Millisecond
	err := n.Stop(n.ctx(), "a", sandbox.WithTimeout(short))
	require.ErrorIs(t, err, context.DeadlineExceeded)
	_, err = n.Wait(n.ctx(), "a")
	require.NoError(t, err)
	require.Zero(t, n.driver.running())
}

func TestManyCallersAtOnce(t *testing.T) {
	n := newNode(t)
	var wg sync.WaitGroup
	for i := range 8 {
		id := fmt.Sprint("pod", i)
		wg.Go(func() {
			if err := n.create(id); err != nil {
				t.Error(err)
				return
			}
			var inner sync.WaitGroup
			for range 3 {
				inner.Go(func() {
					if _, err := n.Start(n.ctx(), id); err != nil {
						t.Error(err)
					}
				})
			}
			inner.Wait()
			for range 3 {
				inner.Go(func() { _, _ = n.Status(n.ctx(), id, true) })
				inner.Go(func() {
					if err := n.Stop(n.ctx(), id); err != nil {
						t.Error(err)
					}
				})
				inner.Go(func() {
					if err := n.Shutdown(n.ctx(), id); err != nil {
						t.Error(err)
					}
				})
			}
			inner.Wait()
		})
	}
	wg.Wait()
	require.Equal(t, 8, n.driver.boots)
	n.requireNothing()
}

func TestAPodWithoutANetwork(t *testing.T) {
	n := newNode(t)
	require.NoError(t, n.Create(n.ctx(), sandbox.Sandbox{ID: "a"}))
	_, err := n.Start(n.ctx(), "a")
	require.NoError(t, err)
	require.Empty(t, n.driver.only(t).nics)
	require.Empty(t, n.net.connected)
}

func TestMetricsOfAProcessWithoutACgroup(t *testing.T) {
	t.Parallel()
	m, err := processUsage(uint32(os.Getpid()))
	require.NoError(t, err)
	require.Positive(t, m.GetMemory().GetUsage().GetUsage())
	_, err = processUsage(1 << 31)
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
}

func TestShimsAreIdentified(t *testing.T) {
	n := newNode(t)
	p := n.run("a")
	id := p.shim.id
	require.True(t, isClosedSoon(t, func() bool { _, err := process.Identify(id.Pid); return err == nil }))
	wrong := id
	wrong.StartTime++
	_, err := adoptShim(wrong)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
}

func isClosedSoon(t *testing.T, cond func() bool) bool {
	t.Helper()
	for range 100 {
		if cond() {
			return true
		}
		time.Sleep(10 * time.Millisecond)
	}
	return false
}
