// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"google.golang.org/protobuf/types/known/emptypb"

	hostv1 "github.com/cloudhv/containerd-cloudhv/controller/hostapi/v1"
)

// lossWait is how long the end of a VM is waited for whose shim has lost the guest: as a
// rule the guest is lost because the VM ends, and that has a cause of its own.
const lossWait = time.Second

// Lost implements hostv1.HostService.
func (h *HostService) Lost(ctx context.Context, req *hostv1.LostRequest) (*emptypb.Empty, error) {
	if err := h.c.lost(withPod(ctx, req.GetSandboxId()), req.GetSandboxId()); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &emptypb.Empty{}, nil
}

// lost begins to end a sandbox whose shim has given up the guest: its containers have ended
// with that and no other can be made, so it is to be seen as not ready. The VM runs on if
// it is a guest that has broken a rule, or is silent.
func (c *Controller) lost(ctx context.Context, id string) error {
	p, err := c.get(id)
	if err != nil {
		return err
	}
	proc, err := p.process()
	if err != nil {
		return fmt.Errorf("take hold of the VM: %w", err)
	}
	if proc == nil {
		return nil
	}
	timer := time.NewTimer(lossWait)
	defer timer.Stop()
	select {
	case <-proc.Done():
		return nil // watch sees to it
	case <-p.exited:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
	}
	const cause = "the guest was lost"
	log.G(ctx).WithField("cause", p.withLoss(ctx, cause)).Error("sandbox ends unexpectedly")
	c.end(untraced(ctx), p, endReason{cause: cause, label: "guest", status: exitKilled})
	return nil
}
