// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestCreateFails(t *testing.T) {
	t.Parallel()
	refused := errgrpc.ToGRPC(errdefs.ErrFailedPrecondition)
	for _, tc := range []struct {
		name string
		make func(p *pod, r *taskapi.CreateTaskRequest)
		want func(error) bool
	}{
		{"no bundle", func(_ *pod, r *taskapi.CreateTaskRequest) { r.Bundle = "/nonexistent" }, errdefs.IsUnknown},
		{"bad ID", func(_ *pod, r *taskapi.CreateTaskRequest) { r.ID = "../x" }, errdefs.IsInvalidArgument},
		{"checkpoint", func(_ *pod, r *taskapi.CreateTaskRequest) { r.Checkpoint = "/x" }, errdefs.IsInvalidArgument},
		{"refused spec", func(p *pod, r *taskapi.CreateTaskRequest) {
			r.Bundle = p.bundle("hooks", func(s *specs.Spec) { s.Hooks = &specs.Hooks{Poststart: []specs.Hook{{Path: "/x"}}} })
		}, errdefs.IsInvalidArgument},
		{"refused mount", func(p *pod, r *taskapi.CreateTaskRequest) {
			r.Bundle = p.bundle("dir", func(s *specs.Spec) {
				s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: "/dev/null", Destination: "/data", Options: []string{"rbind"}})
			})
		}, errdefs.IsInvalidArgument},
		{"guest mount", func(p *pod, r *taskapi.CreateTaskRequest) {
			p.guest.failing("MountVolumes", refused)
			r.Bundle = p.bundle("volume", func(s *specs.Spec) {
				s.Mounts = append(s.Mounts, specs.Mount{Type: "bind", Source: p.dir, Destination: "/data", Options: []string{"rbind"}})
			})
		}, errdefs.IsFailedPrecondition},
		{"pod has ended", func(p *pod, r *taskapi.CreateTaskRequest) {
			r.Bundle = p.bundle("late", func(s *specs.Spec) {
				for i, ns := range s.Linux.Namespaces {
					s.Linux.Namespaces[i].Path = strings.Replace(ns.Path, fmt.Sprintf("/proc/%d/", sandboxPid), "/proc/0/", 1)
				}
			})
		}, errdefs.IsUnavailable},
		{"other terminal", func(_ *pod, r *taskapi.CreateTaskRequest) { r.Terminal = true }, errdefs.IsInvalidArgument},
		{"plugin refuses", func(p *pod, _ *taskapi.CreateTaskRequest) {
			p.daemon.attach = func(context.Context) error { return errdefs.ErrOutOfRange }
		}, errdefs.IsOutOfRange},
		{"no plugin", func(p *pod, _ *taskapi.CreateTaskRequest) {
			p.daemon.attach = func(context.Context) error { return errdefs.ErrNotImplemented }
		}, errdefs.IsUnavailable},
		{"stdout is no FIFO", func(p *pod, r *taskapi.CreateTaskRequest) { r.Stdout = p.dir }, errdefs.IsInvalidArgument},
		{"binary log", func(_ *pod, r *taskapi.CreateTaskRequest) { r.Stderr = "binary:///bin/logger" }, errdefs.IsInvalidArgument},
		{"stream", func(p *pod, _ *taskapi.CreateTaskRequest) { p.guest.failing("Stream", errdefs.ErrAborted) }, errdefs.IsAborted},
		{"guest create", func(p *pod, _ *taskapi.CreateTaskRequest) { p.guest.failing("Create", refused) }, errdefs.IsFailedPrecondition},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			p, ctx := newPod(t), testContext(t)
			s := p.stdio("c", true)
			r := p.createRequest("c", s, "cat")
			tc.make(p, r)
			_, err := p.client.Create(ctx, r)
			require.Error(t, err)
			assert.True(t, tc.want(native(err)), "%v", err)
			assert.False(t, errdefs.IsNotImplemented(native(err)))
			_, err = p.client.State(ctx, &taskapi.StateRequest{ID: "c"})
			assert.True(t, errdefs.IsNotFound(native(err)), "%v", err)
			assert.Empty(t, p.guest.procs)
			assert.Zero(t, openFIFOs(t, p.dir), "FIFOs stay open")

			// The same ID works afterwards.
			p.guest.fine()
			p.daemon.mu.Lock()
			p.daemon.attach = nil
			p.daemon.mu.Unlock()
			p.run("c", s, "cat")
			_, err = io.WriteString(s.in, "again")
			require.NoError(t, err)
			require.NoError(t, s.in.Close())
			_, err = p.client.CloseIO(ctx, &taskapi.CloseIORequest{ID: "c", Stdin: true})
			require.NoError(t, err)
			out, err := io.ReadAll(s.out)
			require.NoError(t, err)
			assert.Equal(t, "again", string(out))
			assert.Equal(t, []string{"/tasks/create", "/tasks/start", "/tasks/exit"}, p.daemon.wait(3))
		})
	}
}

// openFIFOs counts the open ends of FIFOs below dir that only a shim opens: output
// for writing, and input for reading.
func openFIFOs(t *testing.T, dir string) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	n := 0
	for _, fd := range fds {
		name, err := os.Readlink(filepath.Join("/proc/self/fd", fd.Name()))
		if err != nil || filepath.Dir(name) != filepath.Join(dir, "io") {
			continue
		}
		info, err := os.ReadFile(filepath.Join("/proc/self/fdinfo", fd.Name()))
		if err != nil {
			continue
		}
		var pos, flags int
		_, err = fmt.Sscanf(string(info), "pos:\t%d\nflags:\t%o", &pos, &flags)
		require.NoError(t, err, "%s", info)
		input := strings.HasSuffix(name, "-stdin")
		mode := flags & (unix.O_ACCMODE | unix.O_PATH)
		if input && mode == unix.O_RDONLY || !input && mode == unix.O_WRONLY {
			n++
		}
	}
	return n
}

// A create whose caller has gone leaves nothing.
func TestCreateAbandoned(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	release := make(chan struct{})
	p.guest.holding(release, "Create")
	ctx, cancel := context.WithTimeout(testContext(t), 50*time.Millisecond)
	defer cancel()
	_, err := p.client.Create(ctx, p.createRequest("c", nil, "sleep"))
	require.Error(t, err)
	// The shim's own deadline is a little later than the caller's.
	time.Sleep(300 * time.Millisecond)
	close(release)
	eventually(t, "ID is free", func() bool {
		p.svc.mu.Lock()
		defer p.svc.mu.Unlock()
		return len(p.svc.tasks) == 0
	})
	p.guest.mu.Lock()
	assert.Empty(t, p.guest.procs)
	p.guest.mu.Unlock()
	p.guest.fine()
	p.run("c", nil, "sleep")
}

func TestExecFails(t *testing.T) {
	t.Parallel()
	p, ctx := newPod(t), testContext(t)
	p.run("c", nil, "sleep")
	good := execSpec(`{"args":["exit","0"],"cwd":"/","user":{"uid":0,"gid":0}}`)
	for _, call := range []string{"Stream", "Exec"} {
		p.guest.failing(call, errgrpc.ToGRPC(errdefs.ErrAborted))
		_, err := p.client.Exec(ctx, &taskapi.ExecProcessRequest{ID: "c", ExecID: "e", Spec: good, Stdout: p.stdio("e"+call, false).paths[1]})
		assert.True(t, errdefs.IsAborted(native(err)), "%v", err)
		p.guest.fine()
	}
	_, err := p.client.Exec(ctx, &taskapi.ExecProcessRequest{ID: "c", ExecID: "e", Spec: execSpec(`{"args":["x"],"cwd":"/","user":{},"apparmorProfile":"mine"}`)})
	assert.True(t, errdefs.IsInvalidArgument(native(err)), "%v", err)
	_, err = p.client.Exec(ctx, &taskapi.ExecProcessRequest{ID: "c", ExecID: "e"})
	assert.True(t, errdefs.IsInvalidArgument(native(err)), "%v", err)
	p.exec("c", "e", nil, "exit", "4")
	p.guest.failing("Start", errgrpc.ToGRPC(errdefs.ErrAborted))
	_, err = p.client.Start(ctx, &taskapi.StartRequest{ID: "c", ExecID: "e"})
	assert.True(t, errdefs.IsAborted(native(err)), "%v", err)
	p.guest.fine()
	_, err = p.client.Start(ctx, &taskapi.StartRequest{ID: "c", ExecID: "e"})
	require.NoError(t, err)
	assert.EqualValues(t, 4, p.wait("c", "e").ExitStatus)
}

func TestVMLost(t *testing.T) {
	t.Parallel()
	p, ctx := newPod(t), testContext(t)
	s := p.stdio("c", true)
	p.run("c", s, "sleep")
	p.create("created", nil, "sleep")
	p.exec("c", "e", nil, "sleep")
	p.exec("c", "unstarted", nil, "sleep")
	_, err := p.client.Start(ctx, &taskapi.StartRequest{ID: "c", ExecID: "e"})
	require.NoError(t, err)
	p.run("done", nil, "exit", "5")
	p.wait("done", "")

	began := time.Now()
	p.guest.die()
	for _, proc := range [][2]string{{"c", ""}, {"c", "e"}, {"c", "unstarted"}, {"created", ""}} {
		assert.EqualValues(t, 137, p.wait(proc[0], proc[1]).ExitStatus)
		assert.Equal(t, tasktypes.Status_STOPPED, p.state(proc[0], proc[1]).Status)
	}
	assert.Less(t, time.Since(began), 10*time.Second)
	assert.EqualValues(t, 5, p.wait("done", "").ExitStatus)
	_, err = io.ReadAll(s.out)
	require.NoError(t, err, "output ends with the VM")

	for name, call := range map[string]func() error{
		"create": func() error { _, err := p.client.Create(ctx, p.createRequest("n", nil)); return err },
		"create that joins what was lost": func() error {
			r := p.createRequest("n", nil)
			r.Bundle = p.bundle("n", func(s *specs.Spec) {
				for i, ns := range s.Linux.Namespaces {
					if ns.Type == specs.PIDNamespace {
						s.Linux.Namespaces[i].Path = fmt.Sprintf("/proc/%d/ns/pid", p.init("c").pid)
					}
				}
			})
			_, err := p.client.Create(ctx, r)
			return err
		},
		"stats": func() error { _, err := p.client.Stats(ctx, &taskapi.StatsRequest{ID: "c"}); return err },
	} {
		err := call()
		assert.True(t, errdefs.IsUnavailable(native(err)), "%s: %v", name, err)
	}
	_, err = p.client.Kill(ctx, &taskapi.KillRequest{ID: "c", Signal: 9})
	assert.True(t, errdefs.IsNotFound(native(err)), "%v", err)
	_, err = p.client.Exec(ctx, &taskapi.ExecProcessRequest{ID: "c", ExecID: "x"})
	assert.True(t, errdefs.IsFailedPrecondition(native(err)), "%v", err)
	assert.EqualValues(t, 137, p.delete("c", "e").ExitStatus)
	for id, status := range map[string]uint32{"c": 137, "created": 137, "done": 5} {
		assert.Equal(t, status, p.delete(id, "").ExitStatus)
	}
	assert.FileExists(t, filepath.Join(p.dir, VMLostFile))
	eventually(t, "the plugin is told", func() bool {
		p.daemon.mu.Lock()
		defer p.daemon.mu.Unlock()
		return len(p.daemon.lost) == 1
	})
}

// A guest that does not answer holds up neither statistics nor state, and what
// cannot be killed in it counts as lost.
func TestSilentGuest(t *testing.T) {
	t.Parallel()
	p, ctx := newPod(t), testContext(t)
	p.run("a", nil, "sleep")
	p.run("b", nil, "sleep")
	p.svc.killLimit = 300 * time.Millisecond
	release := make(chan struct{})
	p.guest.holding(release, "*")

	began := time.Now()
	for range 5 {
		for _, id := range []string{"a", "b"} {
			_, err := p.client.Stats(ctx, &taskapi.StatsRequest{ID: id})
			assert.True(t, errdefs.IsUnavailable(native(err)), "%v", err)
			p.state(id, "")
			_, err = p.client.Pids(ctx, &taskapi.PidsRequest{ID: id})
			assert.NoError(t, err)
		}
	}
	assert.Less(t, time.Since(began), 5*statsWait, "only the first question waits")
	close(release)
	p.guest.fine()
	// No answer is still on its way after that.
	for _, id := range []string{"a", "b"} {
		eventually(t, "answers again", func() bool {
			_, err := p.client.Stats(ctx, &taskapi.StatsRequest{ID: id})
			return err == nil
		})
	}

	never := make(chan struct{})
	p.guest.holding(never, "*")
	_, err := p.client.Kill(ctx, &taskapi.KillRequest{ID: "a", Signal: 15})
	require.NoError(t, err, "containerd goes on to a SIGKILL")
	assert.Equal(t, tasktypes.Status_RUNNING, p.state("a", "").Status)
	assert.False(t, p.svc.guest.lost(), "only what is killed has to end")
	_, err = p.client.Kill(ctx, &taskapi.KillRequest{ID: "a", Signal: 9})
	require.NoError(t, err)
	assert.EqualValues(t, 137, p.wait("a", "").ExitStatus)
	assert.EqualValues(t, 137, p.wait("b", "").ExitStatus)
	p.delete("a", "")
}

// A guest that answers, and only not to a signal, is not silent: who sends the
// signal gets to know.
func TestSignalWithoutAnswer(t *testing.T) {
	t.Parallel()
	p, ctx := newPod(t), testContext(t)
	p.run("c", nil, "sleep")
	p.svc.killLimit = 2 * time.Second
	asked := make(chan struct{})
	p.guest.intercept(func(_ context.Context, call string) error {
		if call == "Kill" {
			close(asked)
			<-p.guest.done
		}
		return nil
	})
	answered := make(chan error, 1)
	go func() {
		_, err := p.client.Kill(ctx, &taskapi.KillRequest{ID: "c", Signal: 15})
		answered <- err
	}()
	<-asked
	_, err := p.client.Stats(ctx, &taskapi.StatsRequest{ID: "c"})
	require.NoError(t, err)
	err = <-answered
	assert.True(t, errdefs.IsDeadlineExceeded(native(err)), "%v", err)
}

// A guest that answers everything but tells no end counts as lost when what was
// killed in it goes on, from the first call on.
func TestKillThatEndsNothing(t *testing.T) {
	t.Parallel()
	p, ctx := newPod(t), testContext(t)
	p.svc.endLimit = 300 * time.Millisecond
	never := make(chan struct{})
	p.guest.holding(never, "Wait")
	p.run("c", nil, "sleep")
	p.run("other", nil, "sleep")
	kill := func(id string, signal uint32) {
		_, err := p.client.Kill(ctx, &taskapi.KillRequest{ID: id, Signal: signal, All: true})
		require.NoError(t, err)
	}
	kill("other", 15)
	assert.Nil(t, p.init("other").doom, "only what is killed has to end")
	kill("c", 9)
	first := p.init("c").doom
	require.NotNil(t, first)
	kill("c", 9)
	assert.Same(t, first, p.init("c").doom, "another call gives no more time")
	assert.EqualValues(t, 137, p.wait("c", "").ExitStatus)
	assert.EqualValues(t, 137, p.wait("other", "").ExitStatus)
	why, err := os.ReadFile(filepath.Join(p.dir, VMLostFile))
	require.NoError(t, err)
	assert.Contains(t, string(why), `container "c" has not ended`)
	p.delete("c", "")
}

// What ends when it is killed is no reason to give up a guest.
func TestKillThatEnds(t *testing.T) {
	t.Parallel()
	p, ctx := newPod(t), testContext(t)
	p.svc.endLimit = 100 * time.Millisecond
	p.run("c", nil, "sleep")
	p.run("other", nil, "sleep")
	_, err := p.client.Kill(ctx, &taskapi.KillRequest{ID: "c", Signal: 9})
	require.NoError(t, err)
	assert.EqualValues(t, 137, p.wait("c", "").ExitStatus)
	assert.False(t, p.init("c").doom.Stop(), "the timer goes on")
	assert.False(t, p.svc.guest.lost())
	assert.Equal(t, tasktypes.Status_RUNNING, p.state("other", "").Status)
}

// A guest that refuses to delete what has ended keeps nobody from going on; what
// has not ended is not deleted that way.
func TestDeleteFails(t *testing.T) {
	t.Parallel()
	p, ctx := newPod(t), testContext(t)
	p.run("c", nil, "exit", "5")
	p.wait("c", "")
	p.create("created", nil, "sleep")
	p.guest.failing("Delete", errgrpc.ToGRPC(errdefs.ErrInternal))
	assert.EqualValues(t, 5, p.delete("c", "").ExitStatus)
	_, err := p.client.State(ctx, &taskapi.StateRequest{ID: "c"})
	assert.True(t, errdefs.IsNotFound(native(err)), "%v", err)
	_, err = p.client.Delete(ctx, &taskapi.DeleteRequest{ID: "created"})
	assert.True(t, errdefs.IsInternal(native(err)), "%v", err)
}

// Events wait for containerd, in order, and a create does too.
func TestContainerdAway(t *testing.T) {
	t.Parallel()
	p, ctx := newPod(t), testContext(t)
	p.create("c", nil, "exit", "6")
	// An event whose answer is lost is told twice.
	p.svc.events.flush(ctx)
	p.daemon.stop()
	_, err := p.client.Start(ctx, &taskapi.StartRequest{ID: "c"})
	require.NoError(t, err)
	assert.EqualValues(t, 6, p.wait("c", "").ExitStatus)
	p.delete("c", "")
	created := make(chan error)
	go func() {
		_, err := p.client.Create(ctx, p.createRequest("d", nil, "sleep"))
		created <- err
	}()
	select {
	case err := <-created:
		t.Fatalf("created without containerd: %v", err)
	case <-time.After(300 * time.Millisecond):
	}
	limited, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	_, err = p.client.Create(limited, p.createRequest("e", nil, "sleep"))
	require.Error(t, err)
	p.daemon.start()
	require.NoError(t, <-created)
	assert.Equal(t, []string{"/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete", "/tasks/create"}, p.daemon.wait(5))
}

func TestEventsAreBounded(t *testing.T) {
	t.Parallel()
	// Nothing sends them.
	p := newPublisher(nil, "x")
	for range maxQueuedEvents + 100 {
		p.publish(eventFor(t))
	}
	assert.Len(t, p.queue, maxQueuedEvents)
	assert.Equal(t, 100, p.dropped)
}
