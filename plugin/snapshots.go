// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package plugin

import (
	"context"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"

	// Before this package's init, so that its snapshotters are registered.
	_ "github.com/containerd/containerd/v2/cmd/containerd/builtins"

	"github.com/cloudhv/containerd-cloudhv/controller"
)

// layers are the writable layers of containers in VMs.
var layers = controller.NewLayers()

// init makes each snapshotter that is compiled in tell of a container in a VM what its
// writable layer takes there. CRI asks the snapshotter for that, for kubelet's limits
// of ephemeral storage, and on the host such a layer is always empty.
func init() {
	all := registry.Graph(nil)
	registry.Reset()
	for i := range all {
		r := &all[i]
		if r.Type == snapshotPlugin {
			r.InitFn = measured(r.InitFn, layers)
		}
		registry.Register(r)
	}
}

type initFn = func(*plugin.InitContext) (any, error)

// measured wraps the snapshotter that a plugin makes.
func measured(make initFn, l *controller.Layers) initFn {
	return func(ic *plugin.InitContext) (any, error) {
		v, err := make(ic)
		if err != nil {
			return v, err
		}
		s, ok := v.(snapshots.Snapshotter)
		if !ok {
			return v, nil
		}
		m := &measuredSnapshotter{Snapshotter: s, layers: l}
		if c, ok := v.(snapshots.Cleaner); ok {
			return &measuredCleaner{measuredSnapshotter: m, Cleaner: c}, nil
		}
		return m, nil
	}
}

// measuredSnapshotter is a snapshotter that knows of layers in VMs.
type measuredSnapshotter struct {
	snapshots.Snapshotter
	layers *controller.Layers
}

// Usage implements snapshots.Snapshotter.
func (m *measuredSnapshotter) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	// The metadata's keys are NAMESPACE/NUMBER/KEY.
	if u, ok := m.layers.Usage(key[strings.LastIndexByte(key, '/')+1:]); ok {
		return u, nil
	}
	return m.Snapshotter.Usage(ctx, key)
}

// measuredCleaner is one that cleans up apart from removing.
type measuredCleaner struct {
	*measuredSnapshotter
	snapshots.Cleaner
}

var (
	_ snapshots.Snapshotter = (*measuredCleaner)(nil)
	_ snapshots.Cleaner     = (*measuredCleaner)(nil)
)
