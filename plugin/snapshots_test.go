// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package plugin

import (
	"context"
	"errors"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/controller"
)

type hostSnapshotter struct{ snapshots.Snapshotter }

func (hostSnapshotter) Usage(_ context.Context, key string) (snapshots.Usage, error) {
	return snapshots.Usage{Size: int64(len(key))}, nil
}

type cleaningSnapshotter struct{ hostSnapshotter }

func (cleaningSnapshotter) Cleanup(context.Context) error { return errors.New("cleaned") }

// A wrapped snapshotter is what it was, but for layers that are in a VM.
func TestMeasured(t *testing.T) {
	t.Parallel()
	init := func(v any, err error) (any, error) {
		return measured(func(*plugin.InitContext) (any, error) { return v, err }, controller.NewLayers())(nil)
	}
	v, err := init(hostSnapshotter{}, nil)
	require.NoError(t, err)
	u, err := v.(snapshots.Snapshotter).Usage(t.Context(), "k8s.io/12/c")
	require.NoError(t, err)
	require.EqualValues(t, len("k8s.io/12/c"), u.Size)
	_, cleans := v.(snapshots.Cleaner)
	require.False(t, cleans)

	v, err = init(cleaningSnapshotter{}, nil)
	require.NoError(t, err)
	require.ErrorContains(t, v.(snapshots.Cleaner).Cleanup(t.Context()), "cleaned")

	_, err = init(nil, plugin.ErrSkipPlugin)
	require.ErrorIs(t, err, plugin.ErrSkipPlugin)
	v, err = init("no snapshotter", nil)
	require.NoError(t, err)
	require.Equal(t, "no snapshotter", v)
}

// All that is compiled in is registered, once, whatever was done to it.
func TestAllAreRegistered(t *testing.T) {
	t.Parallel()
	found := map[string]int{}
	for _, r := range registry.Graph(nil) {
		found[r.URI()]++
	}
	for _, uri := range []string{
		"io.containerd.snapshotter.v1.overlayfs", "io.containerd.snapshotter.v1.erofs", "io.containerd.metadata.v1.bolt",
		"io.containerd.grpc.v1.cri", "io.containerd.sandbox.controller.v1.cloudhv",
	} {
		require.Equal(t, 1, found[uri], uri)
	}
}
