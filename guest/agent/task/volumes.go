// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package task

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/volumes"
	"github.com/cloudhv/containerd-cloudhv/guest/api"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// MountVolumes implements the Task service.
func (s *Service) MountVolumes(_ context.Context, r *guestv1.MountVolumesRequest) (*emptypb.Empty, error) {
	s.volumesMu.Lock()
	defer s.volumesMu.Unlock()
	if s.volumes {
		return nil, fmt.Errorf("volumes are mounted at %s: %w", api.VolumeRoot, errdefs.ErrAlreadyExists)
	}
	if err := s.cfg.Ready(); err != nil {
		return nil, err
	}
	conn, err := s.cfg.Streams.Take(r.GetStream())
	if err != nil {
		return nil, err
	}
	if err := volumes.Mount(conn, api.VolumeRoot, r.GetMessageBytes()); err != nil {
		return nil, err
	}
	s.volumes = true
	return &emptypb.Empty{}, nil
}
