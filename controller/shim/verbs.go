// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/cloudhv/containerd-cloudhv/controller/shim/guestspec"
	wirev1 "github.com/cloudhv/containerd-cloudhv/controller/shim/wire/v1"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
)

// Start starts a created container, or a process that Exec has added.
func (s *service) Start(ctx context.Context, r *wirev1.StartRequest) (*wirev1.StartResponse, error) {
	p, err := s.process(r.Id, r.ExecId)
	if err != nil {
		return nil, err
	}
	call := "start"
	if r.ExecId != "" {
		call = "exec"
	}
	rep := s.newReport(call, r.Id)
	pid, err := p.start(ctx)
	rep.send(ctx, err)
	if err != nil {
		return nil, fmt.Errorf("start: %w", err)
	}
	return &wirev1.StartResponse{Pid: pid}, nil
}

// Delete removes a stopped or never started process; with ExecId "" the container.
func (s *service) Delete(ctx context.Context, r *wirev1.DeleteRequest) (*wirev1.DeleteResponse, error) {
	p, err := s.process(r.Id, r.ExecId)
	if err != nil {
		return nil, err
	}
	info, err := p.delete(ctx)
	if err != nil {
		return nil, fmt.Errorf("delete: %w", err)
	}
	if r.ExecId != "" {
		p.task.remove(r.ExecId)
	} else if s.take(p.task) {
		s.detachDisks(ctx, r.Id)
		s.volumes.remove(r.Id)
		// Processes that were exec'd into the container went with it.
		for _, e := range p.task.processes()[1:] {
			e.exit(StatusVMLost, time.Now(), 0)
			e.io.cut()
		}
		p.task.forgetUsage()
		s.events.publish(&wirev1.TaskDelete{
			ContainerId: r.Id,
			Pid:         info.pid,
			ExitStatus:  info.exitStatus,
			ExitedAt:    info.exitTimestamp(),
		})
	}
	s.quiet()
	return &wirev1.DeleteResponse{Pid: info.pid, ExitStatus: info.exitStatus, ExitedAt: info.exitTimestamp()}, nil
}

// take removes a deleted container, and reports whether it was there.
func (s *service) take(t *task) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tasks[t.id] != t {
		return false
	}
	delete(s.tasks, t.id)
	s.sizer.set(t.id, nil)
	return true
}

// Kill sends a signal. A guest that does not even answer a SIGKILL has lost its
// containers as a dead one has, and so has one in which a container outlives it. A
// silent guest's other signals count as sent, and as ignored: after an error
// containerd would give up the stop, and never come to the SIGKILL.
func (s *service) Kill(ctx context.Context, r *wirev1.KillRequest) (*emptypb.Empty, error) {
	p, err := s.process(r.Id, r.ExecId)
	if err != nil {
		return nil, err
	}
	info := p.info()
	switch {
	case info.state == stateStopped, s.guest.lost():
		return nil, fmt.Errorf("%s: process already finished: %w", p, errdefs.ErrNotFound)
	case r.ExecId != "" && !info.tried:
		return nil, fmt.Errorf("%s has not been started: %w", p, errdefs.ErrFailedPrecondition)
	}
	killed := unix.Signal(r.Signal) == unix.SIGKILL
	if killed && r.ExecId == "" {
		p.mustEnd()
	}
	asked := time.Now()
	if err := failpoint.At(ctx, failpoint.TaskKillGuest); err != nil {
		return nil, err
	}
	_, err = callGuest(ctx, s.guest, s.killLimit, func(ctx context.Context, c guestv1.TaskService) (*emptypb.Empty, error) {
		return c.Kill(ctx, &guestv1.KillRequest{Id: r.Id, ExecId: r.ExecId, Signal: r.Signal, All: r.All})
	})
	silent := errors.Is(err, context.DeadlineExceeded) && s.guest.heard.Load() < asked.UnixNano()
	switch {
	case silent && killed:
		s.guest.lose(fmt.Errorf("the guest has not answered for %s while a container was to be killed", s.killLimit))
	case silent:
		log.G(ctx).WithError(err).WithField("container", r.Id).WithField("exec", r.ExecId).WithField("signal", r.Signal).
			Warn("a guest that does not answer was sent a signal")
	case errors.Is(err, errVMLost):
		return nil, fmt.Errorf("%s: process already finished: %w", p, errdefs.ErrNotFound)
	case err != nil:
		return nil, fmt.Errorf("kill: %w", err)
	}
	return &emptypb.Empty{}, nil
}

// Wait answers when the process has ended, and somewhat later if nobody else
// waited for it: see hold.go.
func (s *service) Wait(ctx context.Context, r *wirev1.WaitRequest) (*wirev1.WaitResponse, error) {
	p, err := s.process(r.Id, r.ExecId)
	if err != nil {
		return nil, err
	}
	if err := p.await(ctx); err != nil {
		return nil, err
	}
	info := p.info()
	return &wirev1.WaitResponse{ExitStatus: info.exitStatus, ExitedAt: info.exitTimestamp()}, nil
}

// State answers from what the shim knows. An exit that is held back is not told.
func (s *service) State(_ context.Context, r *wirev1.StateRequest) (*wirev1.StateResponse, error) {
	p, err := s.process(r.Id, r.ExecId)
	if err != nil {
		return nil, err
	}
	info := p.shown()
	return &wirev1.StateResponse{
		Id:         p.id(),
		Bundle:     p.task.bundle,
		Pid:        info.pid,
		Status:     p.task.status(p, info),
		Stdin:      p.paths.stdin,
		Stdout:     p.paths.stdout,
		Stderr:     p.paths.stderr,
		Terminal:   p.paths.terminal,
		ExitStatus: info.exitStatus,
		ExitedAt:   info.exitTimestamp(),
		ExecId:     p.execID,
	}, nil
}

// Pids answers from what the shim knows: the container's first process, also
// when it has ended, and the running ones that were exec'd. containerd asks while
// it starts, and takes a container without any for one that was never made.
func (s *service) Pids(_ context.Context, r *wirev1.PidsRequest) (*wirev1.PidsResponse, error) {
	t, err := s.task(r.Id)
	if err != nil {
		return nil, err
	}
	resp := &wirev1.PidsResponse{}
	for _, p := range t.processes() {
		info := p.info()
		if p.execID == "" {
			resp.Processes = append(resp.Processes, &wirev1.ProcessInfo{Pid: info.pid})
			continue
		}
		if info.state != stateRunning {
			continue
		}
		value, err := proto.Marshal(&wirev1.ProcessDetails{ExecId: p.execID})
		if err != nil {
			return nil, fmt.Errorf("encode process %q: %w", p.execID, err)
		}
		resp.Processes = append(resp.Processes, &wirev1.ProcessInfo{
			Pid:  info.pid,
			Info: &anypb.Any{TypeUrl: "containerd.runc.v1.ProcessDetails", Value: value},
		})
	}
	return resp, nil
}

// Connect tells the pids of shim and container; the latter is 0 if there is none.
func (s *service) Connect(_ context.Context, r *wirev1.ConnectRequest) (*wirev1.ConnectResponse, error) {
	resp := &wirev1.ConnectResponse{ShimPid: uint32(os.Getpid())}
	if t, err := s.task(r.Id); err == nil {
		resp.TaskPid = t.init.info().pid
	}
	return resp, nil
}

// Shutdown is asked for after each container's delete, and does nothing: the
// shim lives as long as the pod, whose controller ends it.
func (s *service) Shutdown(context.Context, *wirev1.ShutdownRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

// Checkpoint is refused.
func (s *service) Checkpoint(_ context.Context, r *wirev1.CheckpointTaskRequest) (*emptypb.Empty, error) {
	return nil, fmt.Errorf("container %q runs in a VM and cannot be checkpointed: %w", r.Id, errdefs.ErrNotImplemented)
}

// Pause freezes a container.
func (s *service) Pause(ctx context.Context, r *wirev1.PauseRequest) (*emptypb.Empty, error) {
	err := s.freeze(ctx, r.Id, true, func(ctx context.Context, c guestv1.TaskService) (*emptypb.Empty, error) {
		return c.Pause(ctx, &guestv1.PauseRequest{Id: r.Id})
	})
	if err != nil {
		return nil, fmt.Errorf("pause: %w", err)
	}
	s.events.publish(&wirev1.TaskPaused{ContainerId: r.Id})
	return &emptypb.Empty{}, nil
}

// Resume thaws a container.
func (s *service) Resume(ctx context.Context, r *wirev1.ResumeRequest) (*emptypb.Empty, error) {
	err := s.freeze(ctx, r.Id, false, func(ctx context.Context, c guestv1.TaskService) (*emptypb.Empty, error) {
		return c.Resume(ctx, &guestv1.ResumeRequest{Id: r.Id})
	})
	if err != nil {
		return nil, fmt.Errorf("resume: %w", err)
	}
	s.events.publish(&wirev1.TaskResumed{ContainerId: r.Id})
	return &emptypb.Empty{}, nil
}

func (s *service) freeze(ctx context.Context, id string, paused bool, call func(context.Context, guestv1.TaskService) (*emptypb.Empty, error)) error {
	t, err := s.task(id)
	if err != nil {
		return err
	}
	if t.init.info().state != stateRunning {
		return fmt.Errorf("container %q is not running: %w", id, errdefs.ErrFailedPrecondition)
	}
	if _, err := callGuest(ctx, s.guest, quickLimit, call); err != nil {
		return err
	}
	t.setPaused(paused)
	return nil
}

// ResizePty sets the size of a process's terminal; without one there is nothing to do.
func (s *service) ResizePty(ctx context.Context, r *wirev1.ResizePtyRequest) (*emptypb.Empty, error) {
	p, err := s.process(r.Id, r.ExecId)
	if err != nil {
		return nil, err
	}
	if !p.paths.terminal {
		return &emptypb.Empty{}, nil
	}
	if p.info().state == stateStopped {
		return nil, fmt.Errorf("resize: %s has ended: %w", p, errdefs.ErrFailedPrecondition)
	}
	const most = 1<<16 - 1
	if r.Width > most || r.Height > most {
		return nil, fmt.Errorf("resize: size is %dx%d: want at most %d each: %w", r.Width, r.Height, most, errdefs.ErrInvalidArgument)
	}
	_, err = callGuest(ctx, s.guest, quickLimit, func(ctx context.Context, c guestv1.TaskService) (*emptypb.Empty, error) {
		return c.ResizePty(ctx, &guestv1.ResizePtyRequest{Id: r.Id, ExecId: r.ExecId, Width: r.Width, Height: r.Height})
	})
	if err != nil {
		return nil, fmt.Errorf("resize: %w", err)
	}
	return &emptypb.Empty{}, nil
}

// CloseIO ends a process's stdin, after what was written before.
func (s *service) CloseIO(_ context.Context, r *wirev1.CloseIORequest) (*emptypb.Empty, error) {
	p, err := s.process(r.Id, r.ExecId)
	if err != nil {
		return nil, err
	}
	if r.Stdin {
		p.io.closeStdin()
	}
	return &emptypb.Empty{}, nil
}

// Update changes a container's limits, and the size of the VM with them. After an
// error both are as before.
func (s *service) Update(ctx context.Context, r *wirev1.UpdateTaskRequest) (*emptypb.Empty, error) {
	t, err := s.task(r.Id)
	if err != nil {
		return nil, err
	}
	if t.init.info().state == stateStopped {
		return nil, fmt.Errorf("update: container %q is not running: %w", r.Id, errdefs.ErrFailedPrecondition)
	}
	var host specs.LinuxResources
	if err := unmarshalStrict(r.Resources.GetValue(), &host); err != nil {
		return nil, fmt.Errorf("update: resources: %w", err)
	}
	guest, err := guestspec.TranslateResources(&host)
	if err != nil {
		return nil, fmt.Errorf("update: %w", err)
	}
	resources, err := marshalSpec(guest)
	if err != nil {
		return nil, fmt.Errorf("update: %w", err)
	}
	log.G(ctx).WithField("container", r.Id).Debug("update")
	err = s.resizeFor(ctx, r.Id, guest, func() error {
		if err := failpoint.At(ctx, failpoint.TaskUpdateGuest); err != nil {
			return err
		}
		_, err := callGuest(ctx, s.guest, quickLimit, func(ctx context.Context, c guestv1.TaskService) (*emptypb.Empty, error) {
			return c.Update(ctx, &guestv1.UpdateRequest{Id: r.Id, Resources: resources})
		})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("update container %q: %w", r.Id, err)
	}
	return &emptypb.Empty{}, nil
}
