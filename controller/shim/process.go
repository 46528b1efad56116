// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"google.golang.org/protobuf/types/known/timestamppb"

	wirev1 "github.com/cloudhv/containerd-cloudhv/controller/shim/wire/v1"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
)

// Exit statuses for processes whose own nobody can tell.
const (
	// StatusVMLost is that of a process whose VM is gone, as if it was killed.
	StatusVMLost = 137
	// StatusUnknown is that of a process nobody watched.
	StatusUnknown = 255
	maxStatus     = 255
)

// processState is where a process is in its life.
//
//	created ──start──▶ running ──exit──▶ stopped ──delete──▶ (gone)
//	   │                                    ▲
//	   ├──exit: killed, or the VM is lost───┘
//	   └──delete──▶ (gone)
type processState int

const (
	stateCreated processState = iota
	stateRunning
	stateStopped
)

// process is a container's first process, or one that was exec'd into it.
type process struct {
	svc    *service
	task   *task
	execID string
	paths  stdioPaths
	io     *processIO

	// order is held while the process is started, ends or is deleted, also across
	// the call to the guest: it gives the events their order.
	order sync.Mutex
	// exited is closed when the process has stopped.
	exited chan struct{}

	// mu guards what follows, and is never held across a call.
	mu         sync.Mutex
	state      processState
	tried      bool // a start was asked of the guest
	pid        uint32
	since      time.Time // no exit was before
	exitStatus uint32
	exitedAt   time.Time
	waits      []context.Context // of the Wait calls from before the exit
	told       bool              // a Wait has answered
	asked      time.Time         // when State first held back the exit
	doom       *time.Timer       // loses a guest in which a killed process does not end
}

func newProcess(t *task, execID string, paths stdioPaths, pio *processIO) *process {
	return &process{
		svc: t.svc, task: t, execID: execID, paths: paths, io: pio,
		exited: make(chan struct{}), since: time.Now(),
	}
}

// processInfo is a consistent view of a process.
type processInfo struct {
	state      processState
	tried      bool
	pid        uint32
	exitStatus uint32
	exitedAt   time.Time
}

func (p *process) info() processInfo {
	p.mu.Lock()
	defer p.mu.Unlock()
	return processInfo{p.state, p.tried, p.pid, p.exitStatus, p.exitedAt}
}

func (i processInfo) exitTimestamp() *timestamppb.Timestamp {
	if i.exitedAt.IsZero() {
		return nil
	}
	return timestamppb.New(i.exitedAt)
}

// start asks the guest to start the process, and tells containerd.
func (p *process) start(ctx context.Context) (uint32, error) {
	p.order.Lock()
	defer p.order.Unlock()
	if err := p.startable(); err != nil {
		return 0, err
	}
	p.mu.Lock()
	p.tried, p.since = true, time.Now()
	p.mu.Unlock()
	if err := p.at(ctx, failpoint.TaskStartGuest, failpoint.ExecStartGuest); err != nil {
		return 0, err
	}
	resp, err := callGuest(ctx, p.svc.guest, startLimit, func(ctx context.Context, c guestv1.TaskService) (*guestv1.StartResponse, error) {
		return c.Start(ctx, &guestv1.StartRequest{Id: p.task.id, ExecId: p.execID})
	})
	if err != nil {
		return 0, err
	}
	if err := checkPid(resp.Pid); err != nil {
		return 0, err
	}
	if err := p.at(ctx, failpoint.TaskStartDone, failpoint.ExecStartDone); err != nil {
		return 0, err
	}
	p.mu.Lock()
	if p.execID == "" {
		// The pid of a container is that of its creation.
		resp.Pid = p.pid
	}
	p.pid, p.state = resp.Pid, stateRunning
	p.mu.Unlock()
	if p.execID == "" {
		p.svc.events.publish(&wirev1.TaskStart{ContainerId: p.task.id, Pid: resp.Pid})
	} else {
		p.svc.events.publish(&wirev1.TaskExecStarted{ContainerId: p.task.id, ExecId: p.execID, Pid: resp.Pid})
	}
	return resp.Pid, nil
}

// at is a point of a container's own process, and another of one that was added.
func (p *process) at(ctx context.Context, own, added failpoint.Point) error {
	if p.execID == "" {
		return failpoint.At(ctx, own)
	}
	return failpoint.At(ctx, added)
}

func (p *process) startable() error {
	if p.execID != "" && p.task.init.info().state != stateRunning {
		return fmt.Errorf("container %q is not running: %w", p.task.id, errdefs.ErrFailedPrecondition)
	}
	if p.info().state != stateCreated {
		return fmt.Errorf("%s has been started before: %w", p, errdefs.ErrFailedPrecondition)
	}
	return nil
}

func (p *process) String() string {
	if p.execID == "" {
		return fmt.Sprintf("container %q", p.task.id)
	}
	return fmt.Sprintf("process %q of container %q", p.execID, p.task.id)
}

// watch waits for the guest to tell the exit. It ends with the process, with
// its deletion, or with the VM.
func (p *process) watch(ctx context.Context) {
	client, err := p.svc.guest.client(ctx)
	if err != nil {
		if ctx.Err() == nil {
			p.exit(StatusVMLost, time.Now(), 0)
		}
		return
	}
	resp, err := client.Wait(ctx, &guestv1.WaitRequest{Id: p.task.id, ExecId: p.execID})
	switch {
	case ctx.Err() != nil:
		// The shim ends, and not the process.
	case err == nil:
		p.exit(resp.ExitStatus, resp.ExitedAt.AsTime(), resp.OomKills)
	case p.svc.guest.lost(), isConnError(err):
		p.exit(StatusVMLost, time.Now(), 0)
	default:
		// After a delete, exit has been called already and this one does nothing.
		if p.info().state != stateStopped {
			log.G(ctx).WithError(guestError(err)).WithField("container", p.task.id).WithField("exec", p.execID).
				Warn("the guest does not tell how a process ended")
		}
		p.exit(StatusUnknown, time.Now(), 0)
	}
}

// exit notes how the process ended and tells containerd; only the first call
// counts. What the guest says is brought into its bounds.
func (p *process) exit(status uint32, at time.Time, oomKills uint64) {
	p.order.Lock()
	defer p.order.Unlock()
	p.exitLocked(status, at, oomKills)
}

// exitLocked is exit for who holds p.order.
func (p *process) exitLocked(status uint32, at time.Time, oomKills uint64) {
	now := time.Now()
	p.mu.Lock()
	if p.state == stateStopped {
		p.mu.Unlock()
		return
	}
	if at.Before(p.since) {
		at = p.since
	}
	if at.After(now) {
		at = now
	}
	p.state, p.exitStatus, p.exitedAt = stateStopped, min(status, maxStatus), at
	pid, tried := p.pid, p.tried
	if p.doom != nil {
		p.doom.Stop()
	}
	p.mu.Unlock()

	p.task.noteOOM(oomKills)
	if p.execID == "" {
		p.task.setPaused(false)
	}
	// An exec that was never started has no exit to tell.
	if tried || p.execID == "" {
		p.svc.events.publish(&wirev1.TaskExit{
			ContainerId: p.task.id,
			Id:          p.id(),
			Pid:         pid,
			ExitStatus:  min(status, maxStatus),
			ExitedAt:    timestamppb.New(at),
		})
	}
	close(p.exited)
	// Closing a stream may wait for the guest.
	go p.io.abortStdin()
	p.svc.quiet()
}

// id is what events call the process: the container's ID for its first.
func (p *process) id() string {
	if p.execID == "" {
		return p.task.id
	}
	return p.execID
}

// mustEnd gives a container that is killed its time to end, from the first call
// on. If it is still there after that, no answer of the guest's can be trusted to
// come, and the guest counts as lost: who stops a pod waits for this exit.
func (p *process) mustEnd() {
	limit := p.svc.endLimit
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state == stateStopped || p.doom != nil {
		return
	}
	p.doom = time.AfterFunc(limit, func() {
		if p.info().state == stateStopped || p.svc.ctx.Err() != nil {
			return
		}
		p.svc.guest.lose(fmt.Errorf("%s has not ended in the guest within %s of being killed", p, limit))
	})
}

// delete removes the process in the guest, after its output is delivered or has
// had the time for it. A VM that is gone has nothing left to remove, and a guest
// that fails to remove what has ended keeps nobody from going on.
func (p *process) delete(ctx context.Context) (processInfo, error) {
	p.order.Lock()
	defer p.order.Unlock()
	info := p.info()
	if info.state == stateRunning {
		return info, fmt.Errorf("%s is still running: %w", p, errdefs.ErrFailedPrecondition)
	}
	if info.state == stateStopped {
		p.io.wait(p.svc.drainLimit)
	}
	status, at := uint32(StatusVMLost), time.Now()
	if !p.svc.guest.lost() {
		if err := p.at(ctx, failpoint.TaskDeleteGuest, failpoint.ExecDeleteGuest); err != nil {
			return info, err
		}
		resp, err := callGuest(ctx, p.svc.guest, deleteLimit, func(ctx context.Context, c guestv1.TaskService) (*guestv1.DeleteResponse, error) {
			return c.Delete(ctx, &guestv1.DeleteRequest{Id: p.task.id, ExecId: p.execID})
		})
		switch {
		case err == nil:
			status, at = resp.ExitStatus, resp.ExitedAt.AsTime()
		case errdefs.IsNotFound(err), errors.Is(err, errVMLost):
		case info.state == stateStopped:
			log.G(ctx).WithError(err).WithField("container", p.task.id).WithField("exec", p.execID).
				Warn("a process that has ended may be left in the guest")
		default:
			return info, err
		}
	}
	if err := p.at(ctx, failpoint.TaskDeleteDone, failpoint.ExecDeleteDone); err != nil {
		return info, err
	}
	p.exitLocked(status, at, 0)
	// The agent ends the streams at a delete: what is on its way still arrives.
	p.io.wait(cutLimit)
	p.io.cut()
	return p.info(), nil
}
