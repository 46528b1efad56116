// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package task

import (
	"context"
	"encoding/json"
	"fmt"
	"math"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/cloudhv/containerd-cloudhv/guest/api"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// maxSignal is the kernel's highest signal number.
const maxSignal = 64

// Kill implements the Task service. It does without crun: the agent is the
// process's parent, so it alone can tell for sure whose pid that is.
func (s *Service) Kill(_ context.Context, r *guestv1.KillRequest) (*emptypb.Empty, error) {
	c, p, err := s.process(r.GetId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	if r.GetSignal() > maxSignal {
		return nil, fmt.Errorf("signal %d: %w", r.GetSignal(), errdefs.ErrInvalidArgument)
	}
	sig := unix.Signal(r.GetSignal())
	if !r.GetAll() || p != c.init {
		if err := p.signal(sig); err != nil {
			return nil, err
		}
		return &emptypb.Empty{}, nil
	}
	if p.alive() == 0 {
		return nil, fmt.Errorf("process already finished: %w", errdefs.ErrNotFound)
	}
	if err := c.group.Signal(sig); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// ResizePty implements the Task service.
func (s *Service) ResizePty(_ context.Context, r *guestv1.ResizePtyRequest) (*emptypb.Empty, error) {
	_, p, err := s.process(r.GetId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	if r.GetWidth() > math.MaxUint16 || r.GetHeight() > math.MaxUint16 {
		return nil, fmt.Errorf("terminal size %dx%d: %w", r.GetWidth(), r.GetHeight(), errdefs.ErrInvalidArgument)
	}
	if err := p.io.Resize(uint16(r.GetWidth()), uint16(r.GetHeight())); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// Pause implements the Task service.
func (s *Service) Pause(ctx context.Context, r *guestv1.PauseRequest) (*emptypb.Empty, error) {
	return s.freeze(ctx, r.GetId(), true)
}

// Resume implements the Task service.
func (s *Service) Resume(ctx context.Context, r *guestv1.ResumeRequest) (*emptypb.Empty, error) {
	return s.freeze(ctx, r.GetId(), false)
}

func (s *Service) freeze(ctx context.Context, id string, pause bool) (*emptypb.Empty, error) {
	c, err := s.container(id)
	if err != nil {
		return nil, err
	}
	c.ops.Lock()
	defer c.ops.Unlock()
	if st, paused := c.init.state(), c.isPaused(); st != stateRunning || paused == pause {
		if paused {
			return nil, fmt.Errorf("container %s is paused: %w", id, errdefs.ErrFailedPrecondition)
		}
		return nil, fmt.Errorf("container %s is %s: %w", id, st, errdefs.ErrFailedPrecondition)
	}
	act := s.cfg.Runtime.Resume
	if pause {
		act = s.cfg.Runtime.Pause
	}
	if err := act(ctx, c.id, c.bundle); err != nil {
		return nil, err
	}
	c.setPaused(pause)
	return &emptypb.Empty{}, nil
}

// Update implements the Task service. A memory limit below what the container uses
// is refused if that cannot be reclaimed: the kernel would kill for it.
func (s *Service) Update(ctx context.Context, r *guestv1.UpdateRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.GetId())
	if err != nil {
		return nil, err
	}
	if len(r.GetResources()) > api.MaxSpecBytes {
		return nil, fmt.Errorf("resources of %d bytes: at most %d: %w", len(r.GetResources()), api.MaxSpecBytes, errdefs.ErrInvalidArgument)
	}
	var res specs.LinuxResources
	if err := json.Unmarshal(r.GetResources(), &res); err != nil {
		return nil, fmt.Errorf("resources: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	c.ops.Lock()
	defer c.ops.Unlock()
	if c.init.alive() == 0 {
		return nil, fmt.Errorf("container %s is not running: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	if res.Memory != nil && res.Memory.Limit != nil {
		if err := c.group.Reclaim(ctx, *res.Memory.Limit); err != nil {
			return nil, fmt.Errorf("limit the memory of container %s: %w", c.id, err)
		}
	}
	if err := s.cfg.Runtime.Update(ctx, c.id, c.bundle, &res); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}
