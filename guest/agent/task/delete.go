// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package task

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// Delete implements the Task service. After a failure it may be repeated.
func (s *Service) Delete(ctx context.Context, r *guestv1.DeleteRequest) (*guestv1.DeleteResponse, error) {
	c, p, err := s.process(r.GetId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	if p == c.init {
		err = c.delete(ctx)
	} else {
		err = c.deleteExec(ctx, p)
	}
	if err != nil {
		return nil, err
	}
	snap := p.snapshot()
	resp := &guestv1.DeleteResponse{Pid: uint32(snap.pid), ExitStatus: uint32(snap.exit.Status)}
	if !snap.exit.At.IsZero() {
		resp.ExitedAt = timestamppb.New(snap.exit.At)
	}
	return resp, nil
}

func (c *container) delete(ctx context.Context) error {
	c.ops.Lock()
	defer c.ops.Unlock()
	if c.init.snapshot().deleted && c.gone() {
		return fmt.Errorf("container %s: %w", c.id, errdefs.ErrNotFound)
	}
	switch c.init.state() {
	case stateStopped:
	case stateCreated:
		if err := c.endCreated(ctx); err != nil {
			return err
		}
	default:
		return fmt.Errorf("cannot delete a running container: %w", errdefs.ErrFailedPrecondition)
	}
	drain(ctx, c.init)
	// Half a removal is of no use to a caller that has gone.
	dctx, cancel := detached(ctx, cleanLimit)
	defer cancel()
	if err := c.destroy(dctx); err != nil {
		return err
	}
	c.s.forget(c)
	return nil
}

// gone says whether another Delete has removed the container.
func (c *container) gone() bool {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	return c.s.containers[c.id] != c
}

// endCreated kills a container that was never started.
func (c *container) endCreated(ctx context.Context) error {
	if err := c.init.signal(unix.SIGKILL); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, killLimit)
	defer cancel()
	select {
	case <-c.init.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("container %s does not end: %w", c.id, ctx.Err())
	}
}

func (c *container) deleteExec(ctx context.Context, p *process) error {
	switch st := p.state(); st {
	case stateStopped:
		drain(ctx, p)
	case stateCreated:
	default:
		return fmt.Errorf("cannot delete a process that is %s: %w", st, errdefs.ErrFailedPrecondition)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.execs[p.execID] != p {
		return fmt.Errorf("process %s of container %s: %w", p.execID, c.id, errdefs.ErrNotFound)
	}
	// It may have been started since the look at its state.
	if err := p.removeUnlessActive(); err != nil {
		return err
	}
	delete(c.execs, p.execID)
	return nil
}

// drain waits until the host has taken the output of a process that ran. Output
// that nobody takes, or that a child of the process still holds open, is given
// up after a while.
func drain(ctx context.Context, p *process) {
	if p.snapshot().pid == 0 {
		return
	}
	timer := time.NewTimer(drainLimit)
	defer timer.Stop()
	select {
	case <-p.io.Drained():
	case <-timer.C:
	case <-ctx.Done():
	}
}
