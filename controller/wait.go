// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/core/sandbox"
)

// Wait returns when the sandbox has ended, whatever the reason: its VM is gone
// and so are its TAPs, as CRI then removes the network namespace.
func (c *Controller) Wait(ctx context.Context, id string) (sandbox.ExitStatus, error) {
	p, err := c.get(id)
	if err != nil {
		return sandbox.ExitStatus{}, err
	}
	select {
	case <-p.exited:
	case <-ctx.Done():
		return sandbox.ExitStatus{}, fmt.Errorf("wait for sandbox %q: %w", id, context.Cause(ctx))
	}
	rec := p.snapshot()
	at := rec.ExitedAt
	if at.IsZero() {
		at = now()
	}
	return sandbox.ExitStatus{ExitStatus: rec.ExitStatus, ExitedAt: at}, nil
}
