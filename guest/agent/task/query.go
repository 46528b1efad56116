// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package task

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cloudhv/containerd-cloudhv/guest/api"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// State implements the Task service.
func (s *Service) State(_ context.Context, r *guestv1.StateRequest) (*guestv1.StateResponse, error) {
	c, p, err := s.process(r.GetId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	snap := p.snapshot()
	resp := &guestv1.StateResponse{Pid: uint32(snap.pid), Status: status(snap.st, c.isPaused()), ExitStatus: uint32(snap.exit.Status)}
	if !snap.exit.At.IsZero() {
		resp.ExitedAt = timestamppb.New(snap.exit.At)
	}
	return resp, nil
}

func status(st state, paused bool) guestv1.Status {
	switch {
	case st == stateStopped:
		return guestv1.Status_STATUS_STOPPED
	case paused:
		return guestv1.Status_STATUS_PAUSED
	case st == stateRunning:
		return guestv1.Status_STATUS_RUNNING
	case st == stateCreated, st == stateStarting:
		return guestv1.Status_STATUS_CREATED
	default:
		return guestv1.Status_STATUS_UNKNOWN
	}
}

// Wait implements the Task service.
func (s *Service) Wait(ctx context.Context, r *guestv1.WaitRequest) (*guestv1.WaitResponse, error) {
	_, p, err := s.process(r.GetId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	snap := p.snapshot()
	if snap.st != stateStopped {
		return nil, fmt.Errorf("process was deleted before its start: %w", errdefs.ErrNotFound)
	}
	return &guestv1.WaitResponse{ExitStatus: uint32(snap.exit.Status), ExitedAt: timestamppb.New(snap.exit.At), OomKills: snap.oomKills}, nil
}

// Pids implements the Task service.
func (s *Service) Pids(_ context.Context, r *guestv1.PidsRequest) (*guestv1.PidsResponse, error) {
	c, err := s.container(r.GetId())
	if err != nil {
		return nil, err
	}
	pids, err := c.group.Pids(api.MaxPids)
	if err != nil {
		return nil, err
	}
	execs := make(map[int]string)
	for _, p := range c.processes() {
		if pid := p.alive(); pid != 0 {
			execs[pid] = p.execID
		}
	}
	resp := &guestv1.PidsResponse{Processes: make([]*guestv1.Process, 0, len(pids))}
	for _, pid := range pids {
		resp.Processes = append(resp.Processes, &guestv1.Process{Pid: uint32(pid), ExecId: execs[pid]})
	}
	return resp, nil
}

// Stats implements the Task service.
func (s *Service) Stats(_ context.Context, r *guestv1.StatsRequest) (*guestv1.StatsResponse, error) {
	c, err := s.container(r.GetId())
	if err != nil {
		return nil, err
	}
	stats, err := c.group.Stats()
	if err != nil {
		return nil, err
	}
	usage, err := c.layer.Usage()
	if err != nil {
		return nil, err
	}
	stats.WritableBytes, stats.WritableInodes = usage.Bytes, usage.Inodes
	return stats, nil
}
