// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package task

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/crun"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/reap"
	"github.com/cloudhv/containerd-cloudhv/guest/api"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// Start implements the Task service.
func (s *Service) Start(ctx context.Context, r *guestv1.StartRequest) (*guestv1.StartResponse, error) {
	c, p, err := s.process(r.GetId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	if p == c.init {
		err = c.start(ctx)
	} else {
		err = c.startExec(ctx, p)
	}
	if err != nil {
		return nil, err
	}
	return &guestv1.StartResponse{Pid: uint32(p.snapshot().pid)}, nil
}

func (c *container) start(ctx context.Context) error {
	c.ops.Lock()
	defer c.ops.Unlock()
	if st := c.init.state(); st != stateCreated {
		return fmt.Errorf("cannot start a container that is %s: %w", st, errdefs.ErrFailedPrecondition)
	}
	if err := c.s.cfg.Runtime.Start(ctx, c.id, c.bundle); err != nil {
		return err
	}
	// It may have stopped by now; then it stays so.
	_ = c.init.to(stateRunning)
	return nil
}

// Exec implements the Task service. After a failure the streams have ended.
func (s *Service) Exec(_ context.Context, r *guestv1.ExecRequest) (_ *emptypb.Empty, retErr error) {
	io, err := s.openIO(r.GetStdio())
	if err != nil {
		return nil, err
	}
	defer func() {
		if retErr != nil {
			io.Close()
		}
	}()
	c, err := s.container(r.GetId())
	if err != nil {
		return nil, err
	}
	if err := checkID("exec ID", r.GetExecId()); err != nil {
		return nil, err
	}
	p := newProcess(r.GetExecId())
	p.io = io
	if p.spec, err = decodeProcess(r.GetProcess()); err != nil {
		return nil, err
	}
	p.spec.Terminal = r.GetStdio().GetTerminal()
	if c.init.alive() == 0 {
		return nil, fmt.Errorf("container %s is not running: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	if err := p.to(stateCreated); err != nil {
		return nil, err
	}
	if err := c.addExec(p); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

func decodeProcess(b []byte) (specs.Process, error) {
	var p specs.Process
	if len(b) > api.MaxSpecBytes {
		return p, fmt.Errorf("process of %d bytes: at most %d: %w", len(b), api.MaxSpecBytes, errdefs.ErrInvalidArgument)
	}
	if err := json.Unmarshal(b, &p); err != nil {
		return p, fmt.Errorf("process: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	return p, checkProcess(&p)
}

func (c *container) addExec(p *process) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.execs[p.execID] != nil {
		return fmt.Errorf("process %s of container %s: %w", p.execID, c.id, errdefs.ErrAlreadyExists)
	}
	if len(c.execs) >= maxExecs {
		return fmt.Errorf("container %s has %d processes added: %w", c.id, maxExecs, errdefs.ErrResourceExhausted)
	}
	c.execs[p.execID] = p
	return nil
}

// startExec runs an added process. Those of one container start side by side.
func (c *container) startExec(ctx context.Context, p *process) (retErr error) {
	if err := p.to(stateStarting); err != nil {
		return err
	}
	defer func() {
		if retErr != nil {
			p.failed()
			p.io.Close()
		}
	}()
	// After the change of state: the container's end waits for those that start.
	if c.init.alive() == 0 {
		return fmt.Errorf("container %s is not running: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	dir := filepath.Join(c.bundle, "exec", p.execID)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make directory of a process: %w", err)
	}
	defer func() {
		// The process may run well; what is left goes with the container.
		if err := os.RemoveAll(dir); err != nil {
			log.G(ctx).WithError(err).Warn("cannot remove the directory of a process")
		}
	}()
	spec := p.spec
	p.spec = specs.Process{}
	if err := c.ownStreams(p, spec.User); err != nil {
		return err
	}
	return c.launch(ctx, p, dir, spec.Terminal, stateRunning, c.execExited(p), func(req crun.Process) (int, error) {
		pid, err := c.s.cfg.Runtime.Exec(ctx, c.id, dir, spec, req)
		if err == nil && spec.OOMScoreAdj != nil {
			setOOMScore(pid, *spec.OOMScoreAdj)
		}
		return pid, err
	})
}

// ownStreams gives the pipes of an added process in a user namespace to its user. crun
// tries that too, but from within, where the pipes are nobody's.
func (c *container) ownStreams(p *process, user specs.User) error {
	n := c.s.cfg.Namespaces()
	if n == nil {
		return nil
	}
	uid, known := n.User(user.UID)
	gid, alsoKnown := n.Group(user.GID)
	if !known || !alsoKnown {
		return fmt.Errorf("process: user %d, group %d: want those of the pod's user namespace: %w", user.UID, user.GID, errdefs.ErrInvalidArgument)
	}
	return p.io.Own(int(uid), int(gid))
}

// setOOMScore does what crun does for the first process only, and runc for all.
// The process may be gone already.
func setOOMScore(pid, score int) {
	_ = os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte(strconv.Itoa(score)), 0)
}

func (c *container) execExited(p *process) func(reap.Exit) {
	return func(e reap.Exit) {
		p.lost()
		p.stopped(e, 0)
	}
}
