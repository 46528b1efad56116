// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package plugin registers the sandbox controller "cloudhv" with containerd,
// and beside it the services that its shims and its people ask. Import it for its
// effect.
package plugin

import (
	"fmt"

	"github.com/containerd/log"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"github.com/containerd/ttrpc"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/cloudhv/containerd-cloudhv/controller"
	"github.com/cloudhv/containerd-cloudhv/controller/config"
	hostv1 "github.com/cloudhv/containerd-cloudhv/controller/hostapi/v1"
)

// Types of containerd's plugins, copied as containerd asks of external plugins.
const (
	sandboxControllerPlugin plugin.Type = "io.containerd.sandbox.controller.v1"
	ttrpcPlugin             plugin.Type = "io.containerd.ttrpc.v1"
	grpcPlugin              plugin.Type = "io.containerd.grpc.v1"
	metadataPlugin          plugin.Type = "io.containerd.metadata.v1"
	leasePlugin             plugin.Type = "io.containerd.lease.v1"
	snapshotPlugin          plugin.Type = "io.containerd.snapshotter.v1"
	eventPlugin             plugin.Type = "io.containerd.event.v1"

	propertyTTRPCAddress = "io.containerd.plugin.ttrpc.address"
)

// ID is the plugin's, and the handler's that CRI is configured with.
const ID = "cloudhv"

func init() {
	registry.Register(&plugin.Registration{
		Type:     sandboxControllerPlugin,
		ID:       ID,
		Requires: []plugin.Type{metadataPlugin, leasePlugin, snapshotPlugin, eventPlugin},
		Config:   config.Default(),
		InitFn:   initController,
	})
	registry.Register(&plugin.Registration{
		Type:     ttrpcPlugin,
		ID:       ID,
		Requires: []plugin.Type{sandboxControllerPlugin},
		InitFn:   initHostService,
	})
	registry.Register(&plugin.Registration{
		Type:     grpcPlugin,
		ID:       ID,
		Requires: []plugin.Type{sandboxControllerPlugin},
		InitFn:   initControlService,
	})
}

// initController never fails: CRI would then serve no handler at all, runc's
// neither. What is wrong is in the log, in the plugin's exports, and in the error
// of every Create.
func initController(ic *plugin.InitContext) (any, error) {
	ctx := log.WithLogger(ic.Context, log.G(ic.Context).WithField("plugin", ID))
	c := build(ctx, ic)
	ic.Meta.Exports["ready"] = "true"
	if err := c.Unfit(); err != nil {
		ic.Meta.Exports["ready"] = "false"
		ic.Meta.Exports["reason"] = err.Error()
		log.G(ctx).WithError(err).Error("cloudhv cannot serve on this node; other handlers are not affected")
	}
	if err := prometheus.Register(c); err != nil {
		log.G(ctx).WithError(err).Error("cannot serve metrics about the present")
	}
	return c, nil
}

// hostService is the ttrpc plugin.
type hostService struct {
	service hostv1.HostService
}

func initHostService(ic *plugin.InitContext) (any, error) {
	c, err := ours(ic)
	if err != nil {
		return nil, err
	}
	return &hostService{service: c.HostService()}, nil
}

// initControlService gives what containerd serves on its gRPC socket.
func initControlService(ic *plugin.InitContext) (any, error) {
	c, err := ours(ic)
	if err != nil {
		return nil, err
	}
	return c.ControlService(), nil
}

// ours is our own controller.
func ours(ic *plugin.InitContext) (*controller.Controller, error) {
	p, err := ic.GetByID(sandboxControllerPlugin, ID)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, plugin.ErrSkipPlugin)
	}
	c, ok := p.(*controller.Controller)
	if !ok {
		return nil, fmt.Errorf("sandbox controller %s is a %T: %w", ID, p, plugin.ErrSkipPlugin)
	}
	return c, nil
}

// RegisterTTRPC makes containerd serve it.
func (s *hostService) RegisterTTRPC(server *ttrpc.Server) error {
	hostv1.RegisterHostService(server, s.service)
	return nil
}
