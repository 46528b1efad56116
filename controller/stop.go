// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/errdefs"
)

// Stop ends the sandbox's VM and releases its network, for which the guest is
// asked first and then made to. A Start under way is cancelled. A sandbox that
// has ended or that is unknown is stopped. If the caller leaves, the ending
// goes on.
func (c *Controller) Stop(ctx context.Context, id string, opts ...sandbox.StopOpt) error {
	ctx = withPod(ctx, id)
	var so sandbox.StopOptions
	for _, opt := range opts {
		opt(&so)
	}
	if so.Timeout != nil {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, *so.Timeout)
		defer cancel()
	}
	p, err := c.get(id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	return c.stop(ctx, p)
}

func (c *Controller) stop(ctx context.Context, p *pod) error {
	e := c.end(ctx, p, endReason{cause: "stopped", label: "stop", graceful: true, status: exitOK})
	select {
	case <-e.done:
		return e.err
	case <-ctx.Done():
		return fmt.Errorf("stop sandbox %q: %w", p.id, context.Cause(ctx))
	}
}
