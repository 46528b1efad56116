// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package cgroup

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

func TestReclaim(t *testing.T) {
	t.Parallel()
	g := fake(t, map[string]string{"memory.current": "1000\n", "memory.reclaim": ""})
	require.NoError(t, g.Reclaim(t.Context(), 1000))
	require.NoError(t, g.Reclaim(t.Context(), -1), "no limit")
	asked, err := g.read("memory.reclaim")
	require.NoError(t, err)
	require.Empty(t, asked, "nothing to do")

	require.ErrorIs(t, g.Reclaim(t.Context(), 400), errdefs.ErrFailedPrecondition)
	asked, err = g.read("memory.reclaim")
	require.NoError(t, err)
	require.Equal(t, "600", string(asked))

	// What is written to a disk first takes some time.
	time.AfterFunc(3*reclaimPause, func() {
		_ = os.WriteFile(filepath.Join(string(g), "memory.current"), []byte("300\n"), 0o600)
	})
	require.NoError(t, g.Reclaim(t.Context(), 400))

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, g.Reclaim(ctx, 100), context.Canceled)
}
