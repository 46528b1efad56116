// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"math"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/stretchr/testify/require"

	hostv1 "github.com/cloudhv/containerd-cloudhv/controller/hostapi/v1"
)

func TestLayers(t *testing.T) {
	n := newNode(t)
	n.containers.sandbox["c"] = "a"
	n.run("a")
	tell := func(sandbox, container string, bytes, inodes uint64, gone bool) error {
		_, err := n.HostService().Usage(n.ctx(), &hostv1.UsageRequest{SandboxId: sandbox, ContainerId: container, Bytes: bytes, Inodes: inodes, Gone: gone})
		return err
	}
	usage := func(want snapshots.Usage, known bool) {
		t.Helper()
		u, ok := n.layers.Usage("c")
		require.Equal(t, known, ok)
		require.Equal(t, want, u)
	}
	usage(snapshots.Usage{}, false)
	require.NoError(t, tell("a", "c", 12, 3, false))
	usage(snapshots.Usage{Size: 12, Inodes: 3}, true)
	// What a guest says is brought into bounds.
	require.NoError(t, tell("a", "c", math.MaxUint64, math.MaxUint64, false))
	usage(snapshots.Usage{Size: n.cfg.ScratchSize, Inodes: maxLayerInodes}, true)
	require.NoError(t, tell("a", "c", 13, 4, false))

	// One pod's shim tells nothing of another's container.
	n.run("b")
	require.ErrorContains(t, tell("b", "c", 1, 1, false), `it is of sandbox "a", not "b"`)
	require.NoError(t, tell("b", "c", 0, 0, true))
	usage(snapshots.Usage{Size: 13, Inodes: 4}, true)
	require.Error(t, tell("none", "c", 1, 1, false))

	require.NoError(t, tell("a", "c", 0, 0, true))
	usage(snapshots.Usage{}, false)
	require.NoError(t, tell("a", "c", 13, 4, false))
	require.NoError(t, n.Shutdown(n.ctx(), "a"))
	usage(snapshots.Usage{}, false)
	require.NoError(t, n.Shutdown(n.ctx(), "b"))
	n.requireNothing()
}
