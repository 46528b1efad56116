// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package task

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/emptypb"

	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

const (
	warmUpID = "warm-up"
	// warmUpLimit bounds the throw-away container's life.
	warmUpLimit = 20 * time.Second
)

// WarmUp implements the Task service. It goes the way of every container, in the
// pod's PID namespace, whose process stays for the pod.
func (s *Service) WarmUp(ctx context.Context, r *guestv1.WarmUpRequest) (_ *emptypb.Empty, retErr error) {
	if s.cfg.Ready() == nil {
		return nil, fmt.Errorf("warm-up: the VM is a pod's: %w", errdefs.ErrFailedPrecondition)
	}
	ctx, cancel := context.WithTimeout(ctx, warmUpLimit)
	defer cancel()
	remove, err := s.cfg.Pod.Placeholder()
	defer func() { retErr = errors.Join(retErr, remove()) }()
	if err != nil {
		return nil, fmt.Errorf("warm-up: %w", err)
	}
	err = s.warmUp(ctx, r)
	if err = errors.Join(err, s.cfg.RootFS.Forget(r.GetImageSerial())); err != nil {
		return nil, fmt.Errorf("warm-up: %w", err)
	}
	return &emptypb.Empty{}, nil
}

// warmUp creates, starts, awaits and deletes a container.
func (s *Service) warmUp(ctx context.Context, r *guestv1.WarmUpRequest) (retErr error) {
	req := &guestv1.CreateRequest{
		Id: warmUpID, Spec: r.GetSpec(), PidNamespace: guestv1.PidNamespace_PID_POD,
		Rootfs: &guestv1.RootFS{ImageSerial: r.GetImageSerial()},
	}
	spec, err := checkCreate(req)
	if err != nil {
		return err
	}
	// What needs nothing of an image: crun tells its version.
	spec.Process.Args, spec.Process.Cwd, spec.Process.User = []string{"/bin/crun", "--version"}, "/", specs.User{}
	io, err := s.openIO(nil)
	if err != nil {
		return err
	}
	if _, err := s.create(ctx, req, spec, io); err != nil {
		io.Close()
		return err
	}
	defer func() {
		cctx, cancel := detached(ctx, cleanLimit)
		defer cancel()
		if retErr != nil {
			_, _ = s.Kill(cctx, &guestv1.KillRequest{Id: warmUpID, Signal: 9, All: true})
		}
		_, err := s.Delete(cctx, &guestv1.DeleteRequest{Id: warmUpID})
		retErr = errors.Join(retErr, err)
	}()
	if _, err := s.Start(ctx, &guestv1.StartRequest{Id: warmUpID}); err != nil {
		return err
	}
	resp, err := s.Wait(ctx, &guestv1.WaitRequest{Id: warmUpID})
	if err != nil {
		return err
	}
	if resp.GetExitStatus() != 0 {
		return fmt.Errorf("the container ended with %d: %w", resp.GetExitStatus(), errdefs.ErrInternal)
	}
	return nil
}
