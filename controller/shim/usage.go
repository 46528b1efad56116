// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"context"
	"time"

	"github.com/containerd/log"
	"github.com/containerd/ttrpc"

	hostv1 "github.com/cloudhv/containerd-cloudhv/controller/hostapi/v1"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// usageAge is after how long a writable layer's usage is told again that has not
// changed: containerd may have been started anew and know nothing of it.
const usageAge = 20 * time.Second

// layerUsage is what was last told of a container's writable layer.
type layerUsage struct {
	bytes, inodes uint64
	at            time.Time
}

// tellUsage tells the plugin what the container's writable layer takes, if that is
// news. CRI takes it from the host's snapshotter, which sees nothing of what is in
// the VM. A containerd that is away is not waited for: the next sample comes.
func (t *task) tellUsage(in *guestv1.StatsResponse) {
	u := layerUsage{bytes: in.GetWritableBytes(), inodes: in.GetWritableInodes(), at: time.Now()}
	t.mu.Lock()
	told := t.usage
	if t.deleted || u.bytes == told.bytes && u.inodes == told.inodes && u.at.Sub(told.at) < usageAge {
		t.mu.Unlock()
		return
	}
	t.usage = u
	t.mu.Unlock()
	t.svc.sendUsage(&hostv1.UsageRequest{ContainerId: t.id, Bytes: u.bytes, Inodes: u.inodes}, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.usage = layerUsage{}
	})
}

// forgetUsage tells the plugin that the layer is gone.
func (t *task) forgetUsage() {
	t.mu.Lock()
	t.deleted = true
	told := !t.usage.at.IsZero()
	t.mu.Unlock()
	if told {
		t.svc.sendUsage(&hostv1.UsageRequest{ContainerId: t.id, Gone: true}, func() {})
	}
}

// sendUsage sends one and calls failed if that fails.
func (s *service) sendUsage(req *hostv1.UsageRequest, failed func()) {
	req.SandboxId = s.cfg.SandboxID
	s.running.Go(func() {
		ctx, cancel := context.WithTimeout(s.ctx, reportLimit)
		defer cancel()
		err := s.daemon.call(ctx, func(ctx context.Context, client *ttrpc.Client) error {
			_, err := hostv1.NewHostClient(client).Usage(ctx, req)
			return err
		})
		if err != nil {
			log.G(ctx).WithError(err).WithField("container", req.ContainerId).Debug("cannot tell what a writable layer takes")
			failed()
		}
	})
}
