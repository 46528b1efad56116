// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"context"
	"net"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// init returns a container's first process.
func (p *pod) init(id string) *process {
	p.t.Helper()
	proc, err := p.svc.process(id, "")
	require.NoError(p.t, err)
	return proc
}

// unread runs a container that ends while containerd is away, with so many bytes
// of output. Each stream's FIFO has nobody who reads.
func (p *pod) unread(id, bytes string) *stdio {
	p.t.Helper()
	s := p.stdio(id, false)
	p.create(id, s, "bytes", bytes)
	require.NoError(p.t, s.out.Close())
	require.NoError(p.t, s.err.Close())
	_, err := p.client.Start(testContext(p.t), &taskapi.StartRequest{ID: id})
	require.NoError(p.t, err)
	<-p.init(id).exited
	return s
}

// waiting begins a Wait.
func (p *pod) waiting(id string) <-chan *taskapi.WaitResponse {
	done := make(chan *taskapi.WaitResponse, 1)
	go func() { done <- p.wait(id, "") }()
	return done
}

// stopped waits for State to tell the exit.
func (p *pod) stopped(id string) {
	p.t.Helper()
	eventually(p.t, "stopped", func() bool { return p.state(id, "").Status == tasktypes.Status_STOPPED })
}

// What a containerd does that comes back: the state, then the FIFOs, then a Wait.
// The output is more than a pipe holds.
func TestExitIsHeldBack(t *testing.T) {
	t.Parallel()
	const size = 150_000
	p, ctx := newPod(t), testContext(t)
	p.svc.tailLimit = time.Minute
	s := p.unread("c", "150000")
	st := p.state("c", "")
	assert.Equal(t, tasktypes.Status_RUNNING, st.Status)
	assert.Zero(t, st.ExitStatus)
	assert.Nil(t, st.ExitedAt)
	assert.NotZero(t, st.Pid)
	_, err := p.client.Kill(ctx, &taskapi.KillRequest{ID: "c", Signal: 9})
	assert.True(t, errdefs.IsNotFound(native(err)), "%v", err)

	r := p.fifo(s.paths[1], syscall.O_RDONLY)
	waited := p.waiting("c")
	select {
	case <-waited:
		t.Error("the exit was told before the output was read")
	case <-time.After(100 * time.Millisecond):
	}
	assert.Equal(t, tasktypes.Status_RUNNING, p.state("c", "").Status)
	n, err := checkPattern(r, 0)
	require.NoError(t, err)
	assert.Equal(t, size, n)
	assert.NotNil(t, (<-waited).ExitedAt)
	assert.Equal(t, tasktypes.Status_STOPPED, p.state("c", "").Status)
	p.delete("c", "")
}

// Who never waits learns of the end when the output has been read, and who never
// reads learns of it too.
func TestHoldEnds(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.svc.drainLimit = 100 * time.Millisecond
	s := p.unread("read", "1000")
	assert.Equal(t, tasktypes.Status_RUNNING, p.state("read", "").Status)
	n, err := checkPattern(p.fifo(s.paths[1], syscall.O_RDONLY), 0)
	require.NoError(t, err)
	assert.Equal(t, 1000, n)
	p.stopped("read")

	p.unread("asked", "1000")
	assert.Equal(t, tasktypes.Status_RUNNING, p.state("asked", "").Status)
	c := p.init("asked")
	c.mu.Lock()
	c.asked = c.asked.Add(-stateLimit)
	c.mu.Unlock()
	assert.Equal(t, tasktypes.Status_STOPPED, p.state("asked", "").Status)

	p.svc.tailLimit = 50 * time.Millisecond
	p.unread("waited", "1000")
	p.wait("waited", "")
	assert.Equal(t, tasktypes.Status_STOPPED, p.state("waited", "").Status)
	p.svc.tailLimit = time.Hour
	p.wait("waited", "")

	p.unread("deleted", "1000")
	for _, id := range []string{"read", "asked", "waited", "deleted"} {
		p.delete(id, "")
	}
}

// An exit is told at once where no output can get lost.
func TestExitIsNotHeldBack(t *testing.T) {
	t.Parallel()
	p, ctx := newPod(t), testContext(t)
	p.svc.tailLimit = time.Hour
	p.unread("silent", "0")
	p.stopped("silent")

	p.run("none", nil, "exit", "0")
	<-p.init("none").exited
	assert.Equal(t, tasktypes.Status_STOPPED, p.state("none", "").Status)

	r := p.createRequest("file", nil, "echo", "x")
	r.Stdout = "file://" + filepath.Join(p.dir, "c.log")
	_, err := p.client.Create(ctx, r)
	require.NoError(t, err)
	_, err = p.client.Start(ctx, &taskapi.StartRequest{ID: "file"})
	require.NoError(t, err)
	<-p.init("file").exited
	assert.Equal(t, tasktypes.Status_STOPPED, p.state("file", "").Status)

	// What is in this FIFO is not from the container, which has never run.
	s := p.stdio("created", false)
	p.create("created", s, "sleep")
	_, err = p.fifo(s.paths[1], syscall.O_WRONLY).Write([]byte("x"))
	require.NoError(t, err)
	_, err = p.client.Kill(ctx, &taskapi.KillRequest{ID: "created", Signal: 9})
	require.NoError(t, err)
	<-p.init("created").exited
	assert.Equal(t, tasktypes.Status_STOPPED, p.state("created", "").Status)

	// Whoever waits when the container ends is told, read or not.
	s = p.stdio("waited", false)
	p.create("waited", s, "bytes", "1000")
	waited := p.waiting("waited")
	p.awaitWaits("waited", 1)
	_, err = p.client.Start(ctx, &taskapi.StartRequest{ID: "waited"})
	require.NoError(t, err)
	<-waited
	assert.Equal(t, tasktypes.Status_STOPPED, p.state("waited", "").Status)
}

// awaitWaits waits until so many Wait calls are pending.
func (p *pod) awaitWaits(id string, n int) {
	p.t.Helper()
	proc := p.init(id)
	eventually(p.t, "waits", func() bool {
		proc.mu.Lock()
		defer proc.mu.Unlock()
		return len(proc.waits) == n
	})
}

// Only a call that is alive when the process ends holds nothing back.
func TestWaitCancelled(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.svc.drainLimit = 100 * time.Millisecond
	p.unread("c", "1000")
	proc := p.init("c")
	dead, cancel := context.WithCancel(context.Background())
	cancel()
	proc.mu.Lock()
	proc.waits = []context.Context{dead}
	proc.mu.Unlock()
	assert.Equal(t, tasktypes.Status_RUNNING, p.state("c", "").Status)
	proc.mu.Lock()
	proc.waits = append(proc.waits, testContext(t))
	proc.mu.Unlock()
	assert.Equal(t, tasktypes.Status_STOPPED, p.state("c", "").Status)
	p.delete("c", "")
}

// A containerd that was waiting and is killed has not been told.
func TestWaitOfTheDead(t *testing.T) {
	t.Parallel()
	p, ctx := newPod(t), testContext(t)
	p.svc.tailLimit = time.Hour
	s := p.stdio("c", false)
	p.create("c", s, "bytes", "1000")
	conn, err := net.Dial("unix", filepath.Join(p.dir, SocketFile))
	require.NoError(t, err)
	client := ttrpc.NewClient(conn)
	done := make(chan error, 1)
	go func() {
		_, err := taskapi.NewTTRPCTaskClient(client).Wait(context.WithoutCancel(ctx), &taskapi.WaitRequest{ID: "c"})
		done <- err
	}()
	p.awaitWaits("c", 1)
	require.NoError(t, client.Close())
	require.Error(t, <-done)
	p.awaitWaits("c", 0)
	_, err = p.client.Start(ctx, &taskapi.StartRequest{ID: "c"})
	require.NoError(t, err)
	<-p.init("c").exited
	assert.Equal(t, tasktypes.Status_RUNNING, p.state("c", "").Status)
	_, err = checkPattern(s.out, 0)
	require.NoError(t, err)
	p.stopped("c")
}
