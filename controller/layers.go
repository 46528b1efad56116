// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"fmt"
	"math"
	"sync"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/protobuf/types/known/emptypb"

	hostv1 "github.com/cloudhv/containerd-cloudhv/controller/hostapi/v1"
)

// maxLayerInodes bounds what a guest may say of its files: 1 for each 512 bytes of
// the largest disk would be more than any file system has.
const maxLayerInodes = math.MaxInt32

// Layers knows what containers' writable layers take in their VMs. The shims tell;
// whoever measures snapshots on the host asks. Methods may be called concurrently.
type Layers struct {
	mu sync.Mutex
	// of are those of a container, by the snapshot's key, which for CRI is the container's ID.
	of map[string]layer
}

type layer struct {
	sandbox string
	usage   snapshots.Usage
}

// NewLayers knows of no layer yet.
func NewLayers() *Layers { return &Layers{of: map[string]layer{}} }

// Usage is what the writable layer of a snapshot takes in a VM; false if it is in none.
func (l *Layers) Usage(key string) (snapshots.Usage, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	u, ok := l.of[key]
	return u.usage, ok
}

func (l *Layers) owner(key string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.of[key].sandbox
}

func (l *Layers) set(key, sandbox string, u snapshots.Usage) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.of[key] = layer{sandbox: sandbox, usage: u}
}

func (l *Layers) drop(key, sandbox string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.of[key].sandbox == sandbox {
		delete(l.of, key)
	}
}

// dropAll forgets the layers of a sandbox that has ended.
func (l *Layers) dropAll(sandbox string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for key, u := range l.of {
		if u.sandbox == sandbox {
			delete(l.of, key)
		}
	}
}

// Usage implements hostv1.HostService.
func (h *HostService) Usage(ctx context.Context, req *hostv1.UsageRequest) (*emptypb.Empty, error) {
	if err := h.c.noteUsage(withPod(ctx, req.GetSandboxId()), req); err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("writable layer of container %q: %w", printable(req.GetContainerId(), maxGuestText), err))
	}
	return &emptypb.Empty{}, nil
}

// noteUsage notes what a layer takes, which is no more than the disk has.
func (c *Controller) noteUsage(ctx context.Context, req *hostv1.UsageRequest) error {
	p, err := c.get(req.GetSandboxId())
	if err != nil {
		return err
	}
	key := req.GetContainerId()
	if req.GetGone() {
		c.layers.drop(key, p.id)
		return nil
	}
	if c.layers.owner(key) != p.id {
		container, err := c.containers.Get(namespaces.WithNamespace(ctx, p.snapshot().Namespace), key)
		if err != nil {
			return err
		}
		if container.SandboxID != p.id {
			return fmt.Errorf("it is of sandbox %q, not %q: %w", container.SandboxID, p.id, errdefs.ErrInvalidArgument)
		}
		if container.SnapshotKey != key {
			return fmt.Errorf("its snapshot is %q, want the container's ID: %w", container.SnapshotKey, errdefs.ErrNotImplemented)
		}
	}
	c.layers.set(key, p.id, snapshots.Usage{
		Size:   int64(min(req.GetBytes(), uint64(c.cfg.ScratchSize))),
		Inodes: int64(min(req.GetInodes(), maxLayerInodes)),
	})
	return nil
}
