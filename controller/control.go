// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/version"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cloudhv/containerd-cloudhv/controller/config"
	ctlv1 "github.com/cloudhv/containerd-cloudhv/controller/ctlapi/v1"
	"github.com/cloudhv/containerd-cloudhv/vmpool"
)

// ControlService serves people and programs that look at the node's VMs and tend
// its pool, on containerd's own gRPC socket.
type ControlService struct {
	ctlv1.UnimplementedControlServer
	c *Controller
}

var _ ctlv1.ControlServer = (*ControlService)(nil)

// ControlService returns the service for people.
func (c *Controller) ControlService() *ControlService {
	return &ControlService{c: c}
}

// Register makes containerd serve it.
func (s *ControlService) Register(server *grpc.Server) error {
	ctlv1.RegisterControlServer(server, s)
	return nil
}

// Status implements ctlv1.ControlServer. It answers on a node that is unfit too.
func (s *ControlService) Status(_ context.Context, _ *ctlv1.StatusRequest) (*ctlv1.StatusResponse, error) {
	c := s.c
	answer := &ctlv1.StatusResponse{
		Fit: c.unfit == nil, Reasons: reasons(c.unfit), Version: version.Version,
		Hypervisor: &ctlv1.Hypervisor{
			Name: c.host.Driver, Version: c.host.Version, Binary: c.host.Binary, Reason: c.why,
			Accelerator: c.host.Accelerator, AcceleratorReason: c.host.Reason,
			Confinement: c.confinement(), OverheadBytes: c.overhead(),
		},
		Pool: c.poolAnswer(),
		Vms:  map[string]uint32{},
	}
	for _, vm := range c.listVMs() {
		answer.Vms[vm.answer.GetState()]++
	}
	if c.pool == nil {
		return answer, nil
	}
	snapshots, err := c.pool.Snapshots()
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	for _, snap := range snapshots {
		answer.Snapshots = append(answer.Snapshots, snapshotAnswer(snap))
	}
	return answer, nil
}

// reasons are the parts of an error that was put together.
func reasons(err error) []string {
	if err == nil {
		return nil
	}
	var list *config.Error
	if !errors.As(err, &list) {
		return []string{valid(err.Error())}
	}
	var texts []string
	for _, problem := range list.Problems {
		texts = append(texts, reasons(problem)...)
	}
	return texts
}

// valid is a text that a message can carry: it may have come from a VMM's log.
func valid(text string) string { return strings.ToValidUTF8(text, "\ufffd") }

// whyOff is why the pool has nothing to give; empty if it has.
func (c *Controller) whyOff() string {
	switch {
	case c.unfit != nil:
		return "the node cannot serve"
	case c.poolErr != nil:
		return "it could not be opened: " + valid(c.poolErr.Error())
	case c.pool == nil || !c.cfg.Pool.Restore:
		return "pool.restore is false"
	default:
		return ""
	}
}

// tended is the pool, or the whole reason why there is none to tend.
func (c *Controller) tended() (*vmpool.Pool, error) {
	why := c.whyOff()
	switch {
	case why == "":
		return c.pool, nil
	case c.unfit != nil:
		// What is wrong with the configuration is not wrong with the call.
		why += ": " + valid(c.unfit.Error())
	}
	return nil, fmt.Errorf("the pool is off: %s: %w", why, errdefs.ErrFailedPrecondition)
}

func (c *Controller) poolAnswer() *ctlv1.Pool {
	if why := c.whyOff(); why != "" {
		return &ctlv1.Pool{OffReason: why}
	}
	s, g := c.pool.Status(), c.pool.Gauges()
	answer := &ctlv1.Pool{
		On: true, Drained: s.Drained, Ready: uint32(s.Ready), Making: uint32(s.Making), Target: uint32(s.Target),
		Max: uint32(g.Max), MemoryBytes: g.MemoryBytes, MaxMemoryBytes: g.MaxMemoryBytes, Usable: s.Usable,
		Hits: uint64(s.Outcomes[vmpool.Hit]), Misses: uint64(s.Outcomes[vmpool.Miss]), Cold: uint64(s.Outcomes[vmpool.Cold]),
		Failed: uint64(s.Outcomes[vmpool.Failed]), Failures: uint32(s.Failures), Pause: durationpb.New(g.Pause),
	}
	if s.Err != nil {
		answer.LastError = valid(s.Err.Error())
	}
	return answer
}

func snapshotAnswer(s vmpool.SnapshotInfo) *ctlv1.Snapshot {
	answer := &ctlv1.Snapshot{Id: s.ID, Bytes: s.Bytes, Users: uint32(s.Users), Current: s.Current, Damaged: s.Damaged}
	if !s.Created.IsZero() {
		answer.Created = timestamppb.New(s.Created)
	}
	return answer
}

// Drain implements ctlv1.ControlServer.
func (s *ControlService) Drain(ctx context.Context, _ *ctlv1.DrainRequest) (*ctlv1.DrainResponse, error) {
	pool, err := s.c.tended()
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	ended := pool.Status().Ready
	pool.Drain()
	log.G(ctx).WithField("ready", ended).Info("draining the pool")
	now, err := pool.Await(ctx, func(now vmpool.Status) bool { return !now.Drained || now.Ready+now.Making+now.Ending == 0 })
	switch {
	case err != nil:
		err = fmt.Errorf("the pool is drained, and %d VMs have not ended yet: %w", now.Ready+now.Making+now.Ending, err)
	case !now.Drained:
		err = fmt.Errorf("the pool was filled meanwhile: %w", errdefs.ErrAborted)
	}
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &ctlv1.DrainResponse{Ended: uint32(ended)}, nil
}

// Fill implements ctlv1.ControlServer.
func (s *ControlService) Fill(ctx context.Context, req *ctlv1.FillRequest) (*ctlv1.FillResponse, error) {
	pool, err := s.c.tended()
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	count := int(req.GetCount())
	if count == 0 {
		pool.Fill()
	} else if err := pool.FillTo(count); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	log.G(ctx).WithField("count", count).Info("filling the pool")
	missing := func(now vmpool.Status) int {
		if count > 0 {
			return count - now.Ready
		}
		return now.Target - now.Ready
	}
	now, err := pool.Await(ctx, func(now vmpool.Status) bool { return now.Drained || now.Failures > 0 || missing(now) <= 0 })
	switch {
	case err == nil && missing(now) <= 0 && !now.Drained:
		return &ctlv1.FillResponse{Ready: uint32(now.Ready)}, nil
	case err != nil:
	case now.Drained:
		err = fmt.Errorf("the pool was drained meanwhile: %w", errdefs.ErrAborted)
	default:
		err = sentinel(now.Err, errdefs.ErrUnavailable)
	}
	return nil, errgrpc.ToGRPC(fmt.Errorf("%d VMs are ready, and %d are missing: %w", now.Ready, max(0, missing(now)), err))
}

// Rebuild implements ctlv1.ControlServer.
func (s *ControlService) Rebuild(ctx context.Context, _ *ctlv1.RebuildRequest) (*ctlv1.RebuildResponse, error) {
	pool, err := s.c.tended()
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	log.G(ctx).Info("rebuilding the base snapshot")
	id, err := pool.Rebuild(ctx)
	if err != nil {
		return nil, errgrpc.ToGRPC(sentinel(err, errdefs.ErrUnavailable))
	}
	snapshots, err := pool.Snapshots()
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	for _, snap := range snapshots {
		if snap.ID == id && !snap.Damaged {
			return &ctlv1.RebuildResponse{Snapshot: snapshotAnswer(snap)}, nil
		}
	}
	return nil, errgrpc.ToGRPC(fmt.Errorf("snapshot %s is gone again: %w", id, errdefs.ErrAborted))
}
