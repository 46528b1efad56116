// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"

	"github.com/cloudhv/containerd-cloudhv/controller/config"
	"github.com/cloudhv/containerd-cloudhv/controller/ctlapi"
	ctlv1 "github.com/cloudhv/containerd-cloudhv/controller/ctlapi/v1"
	"github.com/cloudhv/containerd-cloudhv/vmpool"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// serveControl serves a controller's service on a socket, and connects to it.
func serveControl(t *testing.T, c *Controller) *ctlapi.Client {
	t.Helper()
	dir, err := os.MkdirTemp("", "ctl")
	require.NoError(t, err)
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	require.NoError(t, err)
	server := grpc.NewServer()
	require.NoError(t, c.ControlService().Register(server))
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	client, err := ctlapi.Dial(t.Context(), "unix://"+filepath.Join(dir, "s"))
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, client.Close())
		server.Stop()
		require.NoError(t, <-served)
		require.NoError(t, os.RemoveAll(dir))
	})
	return client
}

func (n *node) statusBy(c *ctlapi.Client) *ctlv1.StatusResponse {
	n.t.Helper()
	s, err := c.Status(n.t.Context(), &ctlv1.StatusRequest{})
	require.NoError(n.t, err)
	return s
}

// list are all VMs by state.
func (n *node) list(c *ctlapi.Client) map[string][]*ctlv1.VM {
	n.t.Helper()
	answer, err := c.List(n.t.Context(), &ctlv1.ListRequest{})
	require.NoError(n.t, err)
	states := map[string][]*ctlv1.VM{}
	for _, vm := range answer.GetVms() {
		states[vm.GetState()] = append(states[vm.GetState()], vm)
	}
	return states
}

func (n *node) console(c *ctlapi.Client, id string, tail int64) (string, error) {
	n.t.Helper()
	var b bytes.Buffer
	_, _, err := c.CopyConsole(n.t.Context(), &b, &ctlv1.ConsoleRequest{Id: id, TailBytes: tail})
	return b.String(), err
}

// A node that cannot serve tells every reason, and tends no pool.
func TestControlOfAnUnfitNode(t *testing.T) {
	t.Parallel()
	unfit := &config.Error{Problems: []error{
		fmt.Errorf("wrong configuration: %w", &config.Error{Problems: []error{errors.New("vmm = \"xen\""), errors.New("a\xff")}}),
		errors.New("no hypervisor"),
	}}
	n := &node{t: t}
	c := serveControl(t, New(Options{Unfit: unfit}))
	s := n.statusBy(c)
	assert.False(t, s.GetFit())
	assert.Equal(t, []string{`vmm = "xen"`, "a\ufffd", "no hypervisor"}, s.GetReasons())
	assert.False(t, s.GetPool().GetOn())
	assert.Equal(t, "the node cannot serve", s.GetPool().GetOffReason())
	assert.Empty(t, n.list(c))
	for name, err := range tendAll(t.Context(), c) {
		require.ErrorIs(t, err, errdefs.ErrFailedPrecondition, name)
		require.ErrorContains(t, err, "no hypervisor", name)
	}
}

// tendAll calls all that changes a pool.
func tendAll(ctx context.Context, c *ctlapi.Client) map[string]error {
	errs := map[string]error{}
	_, errs["drain"] = c.Drain(ctx, &ctlv1.DrainRequest{})
	_, errs["fill"] = c.Fill(ctx, &ctlv1.FillRequest{})
	_, errs["rebuild"] = c.Rebuild(ctx, &ctlv1.RebuildRequest{})
	return errs
}

// Where every pod boots its own VM there is nothing to tend, and pods are listed.
func TestControlWithoutAPool(t *testing.T) {
	n := newNode(t)
	require.NoError(t, n.OpenPool())
	t.Cleanup(func() { require.NoError(t, n.Close()) })
	c := serveControl(t, n.Controller)
	n.run("a")
	s := n.statusBy(c)
	assert.True(t, s.GetFit())
	assert.Empty(t, s.GetReasons())
	assert.Equal(t, "fake", s.GetHypervisor().GetName())
	assert.Equal(t, "a test", s.GetHypervisor().GetAcceleratorReason())
	assert.Equal(t, "a test has no other", s.GetHypervisor().GetReason())
	assert.EqualValues(t, 192<<20, s.GetHypervisor().GetOverheadBytes())
	assert.Equal(t, "pool.restore is false", s.GetPool().GetOffReason())
	assert.Equal(t, map[string]uint32{"ready": 1}, s.GetVms())
	for name, err := range tendAll(t.Context(), c) {
		require.ErrorIs(t, err, errdefs.ErrFailedPrecondition, name)
	}
	vm := n.list(c)["ready"][0]
	assert.Equal(t, "cold", vm.GetOutcome())
	assert.Positive(t, vm.GetVmmPssBytes())
	assert.Positive(t, vm.GetShimPssBytes())
	assert.NotEmpty(t, vm.GetPhases())
	require.NoError(t, n.Stop(n.ctx(), "a"))
	vm = n.list(c)["stopped"][0]
	assert.Zero(t, vm.GetVmmPid(), "it has no process any more")
	assert.Equal(t, "a", vm.GetPod().GetId())
}

func TestControlOfAPool(t *testing.T) {
	n := poolNode(t, 1, 4)
	c := serveControl(t, n.Controller)
	filled, err := c.Fill(t.Context(), &ctlv1.FillRequest{})
	require.NoError(t, err)
	assert.EqualValues(t, 1, filled.GetReady())
	pooled := n.list(c)["pooled"]
	require.Len(t, pooled, 1)
	assert.Nil(t, pooled[0].GetPod())
	assert.Equal(t, n.driver.only(t).pid, int(pooled[0].GetVmmPid()))
	assert.EqualValues(t, 128<<20, pooled[0].GetMemoryBytes())
	assert.WithinDuration(t, time.Now(), pooled[0].GetCreated().AsTime(), time.Minute)
	n.run("a")
	pod := n.list(c)["ready"][0]
	assert.Equal(t, pooled[0].GetId(), pod.GetId())
	assert.Equal(t, "hit", pod.GetOutcome())
	assert.EqualValues(t, 256<<20, pod.GetMemoryBytes())
	assert.Equal(t, testNamespace, pod.GetPod().GetContainerdNamespace())

	// Drained: pods are restored their VMs, and none is made ready.
	drained, err := c.Drain(t.Context(), &ctlv1.DrainRequest{})
	require.NoError(t, err)
	assert.LessOrEqual(t, drained.GetEnded(), uint32(1))
	assert.Equal(t, "miss", n.run("b").snapshot().Outcome)
	s := n.statusBy(c)
	assert.True(t, s.GetPool().GetDrained())
	assert.Zero(t, s.GetPool().GetReady()+s.GetPool().GetMaking()+s.GetPool().GetTarget())
	assert.Equal(t, map[string]uint32{"ready": 2}, s.GetVms())
	assert.EqualValues(t, 1, s.GetPool().GetHits())
	assert.EqualValues(t, 1, s.GetPool().GetMisses())
	require.Len(t, s.GetSnapshots(), 1)
	assert.EqualValues(t, 2, s.GetSnapshots()[0].GetUsers())
	assert.True(t, s.GetSnapshots()[0].GetCurrent())
	assert.Positive(t, s.GetSnapshots()[0].GetBytes())

	// To a number at once.
	_, err = c.Fill(t.Context(), &ctlv1.FillRequest{Count: 5})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	assert.True(t, n.statusBy(c).GetPool().GetDrained(), "what is refused changes nothing")
	filled, err = c.Fill(t.Context(), &ctlv1.FillRequest{Count: 3})
	require.NoError(t, err)
	assert.GreaterOrEqual(t, filled.GetReady(), uint32(3))
	assert.Equal(t, "hit", n.run("c").snapshot().Outcome)
}

// A fill says why it cannot, instead of waiting for ever.
func TestControlFillFails(t *testing.T) {
	n := poolNode(t, 1, 1)
	c := serveControl(t, n.Controller)
	_, err := c.Fill(t.Context(), &ctlv1.FillRequest{})
	require.NoError(t, err)
	_, err = c.Drain(t.Context(), &ctlv1.DrainRequest{})
	require.NoError(t, err)
	n.driver.mu.Lock()
	n.driver.bootErr = errInjected
	n.driver.mu.Unlock()
	_, err = c.Fill(t.Context(), &ctlv1.FillRequest{})
	require.ErrorContains(t, err, "injected")
	require.ErrorContains(t, err, "1 are missing")
	p := n.statusBy(c).GetPool()
	assert.Positive(t, p.GetFailures())
	assert.Contains(t, p.GetLastError(), "injected")
	n.driver.mu.Lock()
	n.driver.bootErr = nil
	n.driver.mu.Unlock()
	_, err = c.Fill(t.Context(), &ctlv1.FillRequest{})
	require.NoError(t, err, "it does not wait for the pause")
}

// Rebuild makes one snapshot however many ask, and disturbs no VM.
func TestControlRebuild(t *testing.T) {
	n := poolNode(t, 1, 1)
	c := serveControl(t, n.Controller)
	_, err := c.Fill(t.Context(), &ctlv1.FillRequest{})
	require.NoError(t, err)
	pod := n.run("a").snapshot()
	old := n.statusBy(c).GetSnapshots()[0]

	gate := make(chan struct{})
	n.driver.mu.Lock()
	n.driver.bootGate = gate
	n.driver.mu.Unlock()
	var wg sync.WaitGroup
	ids := make(chan string, 5)
	for range cap(ids) {
		wg.Go(func() {
			answer, err := c.Rebuild(t.Context(), &ctlv1.RebuildRequest{})
			if assert.NoError(t, err) {
				ids <- answer.GetSnapshot().GetId()
			}
		})
	}
	time.Sleep(50 * time.Millisecond) // for all to have asked
	n.driver.mu.Lock()
	n.driver.bootGate = nil
	n.driver.mu.Unlock()
	close(gate)
	wg.Wait()
	for range cap(ids) {
		assert.Equal(t, old.GetId()+"-1", <-ids)
	}
	n.awaitPool("the ready one is replaced", func(s vmpool.Status) bool {
		p := n.list(c)["pooled"]
		return s.Ready == 1 && len(p) == 1 && p[0].GetSnapshot() == old.GetId()+"-1"
	})
	list := n.statusBy(c).GetSnapshots()
	require.Len(t, list, 2, "the old one has a user")
	assert.True(t, list[0].GetCurrent())
	assert.Equal(t, old.GetId()+"-1", list[0].GetId())
	assert.EqualValues(t, 1, list[1].GetUsers())
	assert.False(t, list[1].GetCurrent())
	p, err := n.get("a")
	require.NoError(t, err)
	assert.Equal(t, pod.VM.Pid, p.snapshot().VM.Pid)
	assert.Equal(t, StateReady, p.snapshot().State)
	assert.Equal(t, old.GetId()+"-1", n.run("b").snapshot().Snapshot)

	require.NoError(t, n.Stop(n.ctx(), "a"))
	require.NoError(t, n.Shutdown(n.ctx(), "a"))
	require.Eventually(t, func() bool { return len(n.statusBy(c).GetSnapshots()) == 1 }, 10*time.Second, time.Millisecond,
		"it goes with its last user")
}

func TestControlConsole(t *testing.T) {
	n := poolNode(t, 0, 0)
	n.awaitPool("the snapshot is made", func(s vmpool.Status) bool { return s.Usable })
	c := serveControl(t, n.Controller)
	dirs := map[string]string{}
	for _, id := range []string{"pod-one", "pod-two"} {
		dirs[id] = n.run(id).snapshot().VM.Dir
	}
	got, err := n.console(c, "pod-one", 0)
	require.NoError(t, err)
	assert.Empty(t, got, "it has printed nothing")
	long := strings.Repeat("x", 3*consoleChunk)
	write := func(name, text string) {
		require.NoError(t, os.WriteFile(filepath.Join(dirs["pod-one"], name), []byte(text), 0o600))
	}
	write(vmm.ConsoleLog, "new\x1b[2J\xff")
	write(vmm.ConsoleLog+vmm.RotatedSuffix, long+"old\n")
	vmID := filepath.Base(dirs["pod-one"])
	for _, id := range []string{"pod-one", "pod-o", vmID, vmID[:len(vmID)-1]} {
		got, err := n.console(c, id, 0)
		require.NoError(t, err, id)
		assert.Equal(t, long+"old\nnew\x1b[2J\xff", got, id)
	}
	got, err = n.console(c, "pod-one", 12)
	require.NoError(t, err)
	assert.Equal(t, "old\nnew\x1b[2J\xff", got)

	for id, want := range map[string]error{
		"": errdefs.ErrInvalidArgument, "pod": errdefs.ErrFailedPrecondition, "nobody": errdefs.ErrNotFound,
		"../" + vmID: errdefs.ErrNotFound, "pod-one/../pod-two": errdefs.ErrNotFound, "pod-one\x00": errdefs.ErrNotFound,
		"/etc/passwd": errdefs.ErrNotFound, ".": errdefs.ErrNotFound, "*": errdefs.ErrNotFound,
	} {
		_, err := n.console(c, id, 0)
		require.ErrorIs(t, err, want, "%q", id)
	}

	// What lies there and is no log of ours is not read.
	log := filepath.Join(dirs["pod-one"], vmm.ConsoleLog)
	require.NoError(t, os.Remove(log))
	require.NoError(t, os.Symlink("/etc/hostname", log))
	_, err = n.console(c, "pod-one", 0)
	require.Error(t, err)
	require.NoError(t, os.Remove(log))
	require.NoError(t, os.Mkdir(log, 0o700))
	_, err = n.console(c, "pod-one", 0)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
}

// The log is rotated while it is read: nothing is told twice, and no byte of what
// was there is missing.
func TestConsoleWhileItIsRotated(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "console.log")
	log, err := vmm.OpenLog(path, 8<<10)
	require.NoError(t, err)
	done := make(chan struct{})
	written := make(chan struct{})
	go func() {
		defer close(written)
		for i := 0; ; i++ {
			select {
			case <-done:
				return
			default:
				_, _ = fmt.Fprintf(log, "%09d\n", i)
			}
		}
	}()
	for range 200 {
		r, size, closeLog, err := openConsole(path)
		require.NoError(t, err)
		var b bytes.Buffer
		_, err = b.ReadFrom(r)
		closeLog()
		require.NoError(t, err)
		require.EqualValues(t, size, b.Len())
		last := -1
		for line := range strings.Lines(b.String()) {
			var i int
			if len(line) < 10 {
				continue // the first or the last one
			}
			_, err := fmt.Sscanf(line, "%d", &i)
			require.NoError(t, err)
			if last >= 0 {
				require.Equal(t, last+1, i)
			}
			last = i
		}
	}
	close(done)
	<-written
	require.NoError(t, log.Close())
}
