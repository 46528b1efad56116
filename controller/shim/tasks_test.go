// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	cgroups "github.com/containerd/cgroups/v3/cgroup2/stats"
	eventsapi "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/anypb"
)

func TestLifeOfAContainer(t *testing.T) {
	t.Parallel()
	p, ctx := newPod(t), testContext(t)
	s := p.stdio("c", false)
	p.create("c", s, "echo", "hello")
	assert.Equal(t, tasktypes.Status_CREATED, p.state("c", "").Status)
	_, err := p.client.Start(ctx, &taskapi.StartRequest{ID: "c"})
	require.NoError(t, err)
	out, err := io.ReadAll(s.out)
	require.NoError(t, err)
	assert.Equal(t, "hello", string(out))
	out, err = io.ReadAll(s.err)
	require.NoError(t, err)
	assert.Equal(t, "err:hello", string(out))
	assert.Zero(t, p.wait("c", "").ExitStatus)

	st := p.state("c", "")
	assert.Equal(t, tasktypes.Status_STOPPED, st.Status)
	assert.Equal(t, s.paths[1], st.Stdout)
	pids, err := p.client.Pids(ctx, &taskapi.PidsRequest{ID: "c"})
	require.NoError(t, err)
	assert.Len(t, pids.Processes, 1, "containerd takes a task without pids for one that was never made")

	_, err = p.client.Kill(ctx, &taskapi.KillRequest{ID: "c", Signal: 9})
	assert.True(t, errdefs.IsNotFound(native(err)), "%v", err)
	del := p.delete("c", "")
	assert.Equal(t, st.Pid, del.Pid)
	_, err = p.client.Delete(ctx, &taskapi.DeleteRequest{ID: "c"})
	assert.True(t, errdefs.IsNotFound(native(err)), "%v", err)
	_, err = p.client.Pids(ctx, &taskapi.PidsRequest{ID: "c"})
	assert.True(t, errdefs.IsNotFound(native(err)), "%v", err)
	_, err = p.client.Shutdown(ctx, &taskapi.ShutdownRequest{ID: "c"})
	require.NoError(t, err)

	assert.Equal(t, []string{"/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"}, p.daemon.wait(4))
	exit := p.daemon.events[2].(*eventsapi.TaskExit)
	assert.Equal(t, "c", exit.ContainerID)
	assert.Equal(t, "c", exit.ID)
	assert.Equal(t, st.Pid, exit.Pid)
	assert.Equal(t, []string{"sb/c"}, p.daemon.attached)
	p.create("c", nil, "exit", "0")
}

func TestLifeOfAnExec(t *testing.T) {
	t.Parallel()
	p, ctx := newPod(t), testContext(t)
	p.create("c", nil, "sleep")
	_, err := p.client.Exec(ctx, &taskapi.ExecProcessRequest{ID: "c", ExecID: "e"})
	assert.True(t, errdefs.IsFailedPrecondition(native(err)), "%v", err)
	_, err = p.client.Start(ctx, &taskapi.StartRequest{ID: "c"})
	require.NoError(t, err)

	s := p.stdio("e", false)
	p.exec("c", "e", s, "echo", "from exec")
	_, err = p.client.Exec(ctx, &taskapi.ExecProcessRequest{ID: "c", ExecID: "e", Spec: execSpec(`{"args":["x"],"cwd":"/","user":{}}`)})
	assert.True(t, errdefs.IsAlreadyExists(native(err)), "%v", err)
	_, err = p.client.Kill(ctx, &taskapi.KillRequest{ID: "c", ExecID: "e", Signal: 9})
	assert.True(t, errdefs.IsFailedPrecondition(native(err)), "%v", err)
	started, err := p.client.Start(ctx, &taskapi.StartRequest{ID: "c", ExecID: "e"})
	require.NoError(t, err)
	out, err := io.ReadAll(s.out)
	require.NoError(t, err)
	assert.Equal(t, "from exec", string(out))
	p.wait("c", "e")
	assert.Equal(t, started.Pid, p.delete("c", "e").Pid)

	p.exec("c", "k", nil, "sleep")
	started, err = p.client.Start(ctx, &taskapi.StartRequest{ID: "c", ExecID: "k"})
	require.NoError(t, err)
	checkExecPid(t, p, started.Pid)
	_, err = p.client.Delete(ctx, &taskapi.DeleteRequest{ID: "c", ExecID: "k"})
	assert.True(t, errdefs.IsFailedPrecondition(native(err)), "%v", err)
	_, err = p.client.Kill(ctx, &taskapi.KillRequest{ID: "c", ExecID: "k", Signal: 15})
	require.NoError(t, err)
	assert.EqualValues(t, 143, p.wait("c", "k").ExitStatus)
	assert.EqualValues(t, 143, p.delete("c", "k").ExitStatus)

	p.exec("c", "never", nil, "sleep")
	p.delete("c", "never")
	assert.Equal(t, []string{
		"/tasks/create", "/tasks/start", "/tasks/exec-added", "/tasks/exec-started", "/tasks/exit",
		"/tasks/exec-added", "/tasks/exec-started", "/tasks/exit", "/tasks/exec-added",
	}, p.daemon.wait(9))
}

func execSpec(json string) *anypb.Any { return &anypb.Any{TypeUrl: "x", Value: []byte(json)} }

func checkExecPid(t *testing.T, p *pod, pid uint32) {
	t.Helper()
	pids, err := p.client.Pids(testContext(t), &taskapi.PidsRequest{ID: "c"})
	require.NoError(t, err)
	require.Len(t, pids.Processes, 2)
	assert.Equal(t, pid, pids.Processes[1].Pid)
	details, err := typeurl.UnmarshalAny(pids.Processes[1].Info)
	require.NoError(t, err)
	assert.Equal(t, "k", details.(*options.ProcessDetails).ExecID)
}

// An exit may be told by the guest before it has answered the start.
func TestExitDuringStart(t *testing.T) {
	t.Parallel()
	p, ctx := newPod(t), testContext(t)
	p.guest.intercept(func(ctx context.Context, call string) error {
		if call == "Started" {
			time.Sleep(5 * time.Millisecond)
		}
		return nil
	})
	const n = 40
	for i := range n {
		id := fmt.Sprintf("c%d", i)
		p.create(id, nil, "exit", "3")
		done := make(chan *taskapi.WaitResponse)
		go func() { done <- p.wait(id, "") }()
		_, err := p.client.Start(ctx, &taskapi.StartRequest{ID: id})
		require.NoError(t, err)
		assert.EqualValues(t, 3, (<-done).ExitStatus)
		p.delete(id, "")
	}
	topics := p.daemon.wait(4 * n)
	for chunk := range slices.Chunk(topics, 4) {
		assert.Equal(t, []string{"/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"}, chunk)
	}
}

func TestManyAtOnce(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	const n = 20
	done := make(chan struct{})
	for i := range n {
		go func() {
			defer func() { done <- struct{}{} }()
			id := fmt.Sprintf("c%d", i)
			s := p.stdio(id, false)
			p.run(id, s, "bytes", "100000")
			got, err := checkPattern(s.out, 0)
			assert.NoError(t, err)
			assert.Equal(t, 100_000, got)
			p.wait(id, "")
			p.delete(id, "")
		}()
	}
	for range n {
		<-done
	}
	assert.Len(t, p.daemon.wait(4*n), 4*n)
}

func TestDeleteOfCreated(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.create("c", nil, "sleep")
	waited := make(chan *taskapi.WaitResponse)
	go func() { waited <- p.wait("c", "") }()
	time.Sleep(20 * time.Millisecond)
	assert.EqualValues(t, 137, p.delete("c", "").ExitStatus)
	assert.EqualValues(t, 137, (<-waited).ExitStatus)
	assert.Equal(t, []string{"/tasks/create", "/tasks/exit", "/tasks/delete"}, p.daemon.wait(3))
}

func TestKillOfCreated(t *testing.T) {
	t.Parallel()
	p, ctx := newPod(t), testContext(t)
	p.create("c", nil, "sleep")
	_, err := p.client.Kill(ctx, &taskapi.KillRequest{ID: "c", Signal: 9, All: true})
	require.NoError(t, err)
	assert.EqualValues(t, 137, p.wait("c", "").ExitStatus)
	_, err = p.client.Start(ctx, &taskapi.StartRequest{ID: "c"})
	assert.True(t, errdefs.IsFailedPrecondition(native(err)), "%v", err)
	p.delete("c", "")
}

// Execs that are there when their container is deleted go with it.
func TestDeleteTakesExecs(t *testing.T) {
	t.Parallel()
	p, ctx := newPod(t), testContext(t)
	p.run("c", nil, "sleep")
	s := p.stdio("e", false)
	p.exec("c", "e", s, "sleep")
	_, err := p.client.Start(ctx, &taskapi.StartRequest{ID: "c", ExecID: "e"})
	require.NoError(t, err)
	_, err = p.client.Kill(ctx, &taskapi.KillRequest{ID: "c", Signal: 9})
	require.NoError(t, err)
	p.wait("c", "")
	waited := make(chan *taskapi.WaitResponse)
	go func() { waited <- p.wait("c", "e") }()
	time.Sleep(20 * time.Millisecond)
	p.delete("c", "")
	assert.EqualValues(t, 137, (<-waited).ExitStatus)
	_, err = io.ReadAll(s.out)
	require.NoError(t, err)
}

func TestPauseResumeUpdateResize(t *testing.T) {
	t.Parallel()
	p, ctx := newPod(t), testContext(t)
	r := p.createRequest("c", p.stdio("c", false), "sleep")
	r.Bundle, r.Terminal = p.bundle("c", func(s *specs.Spec) { s.Process.Terminal = true }, "sleep"), true
	_, err := p.client.Create(ctx, r)
	require.NoError(t, err)
	_, err = p.client.Start(ctx, &taskapi.StartRequest{ID: "c"})
	require.NoError(t, err)
	assert.Empty(t, p.guest.created[0].Stdio.Stderr, "a terminal has one output")
	_, err = p.client.ResizePty(ctx, &taskapi.ResizePtyRequest{ID: "c", Width: 80, Height: 24})
	require.NoError(t, err)
	assert.Equal(t, []string{"c/ 80x24"}, p.guest.sizes)
	_, err = p.client.ResizePty(ctx, &taskapi.ResizePtyRequest{ID: "c", Width: 1 << 16, Height: 24})
	assert.True(t, errdefs.IsInvalidArgument(native(err)), "%v", err)

	_, err = p.client.Pause(ctx, &taskapi.PauseRequest{ID: "c"})
	require.NoError(t, err)
	assert.Equal(t, tasktypes.Status_PAUSED, p.state("c", "").Status)
	_, err = p.client.Resume(ctx, &taskapi.ResumeRequest{ID: "c"})
	require.NoError(t, err)
	assert.Equal(t, tasktypes.Status_RUNNING, p.state("c", "").Status)

	_, err = p.client.Update(ctx, &taskapi.UpdateTaskRequest{ID: "c", Resources: execSpec(`{"devices":[{"allow":false,"access":"rwm"}],"cpu":{"quota":50000,"cpus":"0-3"}}`)})
	require.NoError(t, err)
	assert.JSONEq(t, `{"cpu":{"quota":50000}}`, string(p.guest.updated[0]))
	_, err = p.client.Update(ctx, &taskapi.UpdateTaskRequest{ID: "c", Resources: execSpec(`{"gpu":{}}`)})
	assert.True(t, errdefs.IsInvalidArgument(native(err)), "%v", err)
	assert.ErrorContains(t, err, "gpu")
	_, err = p.client.Checkpoint(ctx, &taskapi.CheckpointTaskRequest{ID: "c"})
	assert.True(t, errdefs.IsFailedPrecondition(native(err)), "%v", err)
	conn, err := p.client.Connect(ctx, &taskapi.ConnectRequest{ID: "c"})
	require.NoError(t, err)
	assert.EqualValues(t, os.Getpid(), conn.ShimPid)
	assert.NotZero(t, conn.TaskPid)
	conn, err = p.client.Connect(ctx, &taskapi.ConnectRequest{ID: "unknown"})
	require.NoError(t, err)
	assert.Zero(t, conn.TaskPid)
	assert.Equal(t, []string{"/tasks/create", "/tasks/start", "/tasks/paused", "/tasks/resumed"}, p.daemon.wait(4))
}

func TestStats(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.run("c", nil, "sleep")
	m := p.stats("c")
	assert.EqualValues(t, 7, m.CPU.UsageUsec)
	assert.EqualValues(t, 4096, m.Memory.Usage)
	assert.EqualValues(t, 2, m.Memory.InactiveFile)
	assert.EqualValues(t, 3, m.Pids.Current)
	assert.EqualValues(t, 9, m.Io.Usage[0].Rbytes)
	// A second question within the second is not the guest's.
	p.guest.failing("Stats", errgrpc.ToGRPC(errdefs.ErrInternal))
	p.stats("c")
}

// Figures of a container that does nothing may become older, and those of one that
// works may not.
func TestNextAge(t *testing.T) {
	t.Parallel()
	age := time.Duration(0)
	for _, want := range []time.Duration{2 * time.Second, 4 * time.Second, restAge, restAge} {
		age = nextAge(age, 100, 100, time.Second)
		assert.Equal(t, want, age)
	}
	assert.Equal(t, sampleAge, nextAge(age, 100, 100+10_000, time.Second), "a hundredth of a processor")
	assert.Equal(t, restAge, nextAge(age, 100, 100+9_999, time.Second))
	assert.Equal(t, sampleAge, nextAge(age, 100, 99, time.Second), "a guest that counts backwards")
	assert.Equal(t, sampleAge, nextAge(age, 0, 1<<64-1, time.Second))
}

func (p *pod) stats(id string) *cgroups.Metrics {
	p.t.Helper()
	resp, err := p.client.Stats(testContext(p.t), &taskapi.StatsRequest{ID: id})
	require.NoError(p.t, err)
	m, err := typeurl.UnmarshalAny(resp.Stats)
	require.NoError(p.t, err)
	return m.(*cgroups.Metrics)
}

// CRI asks for the metrics of a container that ended with 137 to find out
// whether it was out of memory.
func TestOOM(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.run("c", nil, "oom")
	assert.EqualValues(t, 137, p.wait("c", "").ExitStatus)
	assert.EqualValues(t, 2, p.stats("c").MemoryEvents.OomKill)
	time.Sleep(sampleAge)
	p.guest.failing("Stats", errgrpc.ToGRPC(errdefs.ErrInternal))
	assert.EqualValues(t, 2, p.stats("c").MemoryEvents.OomKill)
	p.delete("c", "")
	assert.Equal(t, []string{"/tasks/create", "/tasks/start", "/tasks/oom", "/tasks/exit", "/tasks/delete"}, p.daemon.wait(5))
}

func TestHostileAnswers(t *testing.T) {
	t.Parallel()
	p, ctx := newPod(t), testContext(t)
	before := time.Now()
	p.run("c", nil, "strange")
	w := p.wait("c", "")
	assert.EqualValues(t, 255, w.ExitStatus)
	at := w.ExitedAt.AsTime()
	assert.False(t, at.Before(before) || at.After(time.Now()), "%s", at)

	p.guest.failing("Create", fmt.Errorf("\x1b[2J\nlevel=error %s", strings.Repeat("x", maxAnswer/2)))
	_, err := p.client.Create(ctx, p.createRequest("d", nil, "sleep"))
	require.Error(t, err)
	assert.Less(t, len(err.Error()), 2000)
	assert.NotContains(t, err.Error(), "\x1b")
	assert.NotContains(t, err.Error(), "\n")
	p.guest.failing("Create", errgrpc.ToGRPC(errdefs.ErrNotImplemented))
	_, err = p.client.Create(ctx, p.createRequest("d", nil, "sleep"))
	assert.False(t, errdefs.IsNotImplemented(native(err)), "containerd would take it for an older shim: %v", err)
	for _, pid := range []uint32{0, 1<<32 - 1} {
		p.guest.fine()
		p.guest.mu.Lock()
		p.guest.nextPid = pid - 1
		p.guest.mu.Unlock()
		_, err = p.client.Create(ctx, p.createRequest("d", nil, "sleep"))
		assert.True(t, errdefs.IsInternal(native(err)), "%v", err)
		_, err = p.guest.proc("d", "")
		assert.Error(t, err, "a container is left in the guest")
	}
}
