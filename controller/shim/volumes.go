// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"context"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/cloudhv/containerd-cloudhv/controller/shim/ninep"
	"github.com/cloudhv/containerd-cloudhv/controller/shim/volumes"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
)

// mountLimit is how long the guest may take to mount the volumes' file system.
const mountLimit = time.Minute

// podVolumes are what a pod's containers mount of the host. They cost nothing before
// the first of them.
type podVolumes struct {
	mu     sync.Mutex
	set    *volumes.Set
	closed bool

	mountMu sync.Mutex // held while the guest mounts
	mounted bool
}

// add has the bind mounts among a container's mounts come from volumes.
func (v *podVolumes) add(id string, mounts []specs.Mount) error {
	if !slices.ContainsFunc(mounts, func(m specs.Mount) bool { return m.Type == "bind" }) {
		return nil
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.closed {
		return errVMLost
	}
	if v.set == nil {
		v.set = volumes.NewSet()
	}
	return v.set.Add(id, mounts)
}

// remove gives up those that only this container used.
func (v *podVolumes) remove(id string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.set != nil {
		v.set.Remove(id)
	}
}

// close gives up all of them: there is no guest any more.
func (v *podVolumes) close() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.closed = true
	if v.set != nil {
		v.set.Close()
	}
}

// server is who serves a container's volumes; nil if it has none.
func (v *podVolumes) server(id string) *ninep.Server {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.set == nil || !v.set.Has(id) {
		return nil
	}
	return v.set.Server
}

// mount has the guest mount the volumes' file system, if the container has volumes and
// it is not mounted yet.
func (v *podVolumes) mount(ctx context.Context, id string, g *guestClient) error {
	server := v.server(id)
	if server == nil {
		return nil
	}
	v.mountMu.Lock()
	defer v.mountMu.Unlock()
	if v.mounted {
		return nil
	}
	if _, err := g.client(ctx); err != nil {
		return err
	}
	if err := failpoint.At(ctx, failpoint.TaskCreateMount); err != nil {
		return err
	}
	conn, stream, err := openStream(ctx, g.transport)
	if err != nil {
		return fmt.Errorf("serve volumes: %w", err)
	}
	go serveVolumes(context.WithoutCancel(ctx), server, conn)
	_, err = callGuest(ctx, g, mountLimit, func(ctx context.Context, c guestv1.TaskService) (*emptypb.Empty, error) {
		return c.MountVolumes(ctx, &guestv1.MountVolumesRequest{Stream: stream, MessageBytes: ninep.DefaultMessageBytes})
	})
	if err != nil {
		_ = conn.Close()
		return fmt.Errorf("mount volumes: %w", err)
	}
	v.mounted = true
	return nil
}

// serveVolumes serves the guest until it ends. A guest that breaks the protocol has its
// volumes no more.
func serveVolumes(ctx context.Context, server *ninep.Server, conn net.Conn) {
	if err := server.Serve(conn); err != nil && !errdefs.IsUnavailable(err) {
		log.G(ctx).WithError(err).Warn("the pod's volumes are served no more")
	}
}
