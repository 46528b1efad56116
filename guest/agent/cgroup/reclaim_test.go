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
	g := fake(t, map[string]string{
		"memory.current": "1000\n", "memory.reclaim": "",
		"memory.stat": "anon 500\ninactive_file 300\nactive_file 100\nslab_reclaimable 50\n",
	})
	require.NoError(t, g.Reclaim(t.Context(), 1000))
	require.NoError(t, g.Reclaim(t.Context(), -1), "no limit")
	require.ErrorIs(t, g.Reclaim(t.Context(), 549), errdefs.ErrFailedPrecondition, "so much cannot be had")
	asked, err := g.read("memory.reclaim")
	require.NoError(t, err)
	require.Empty(t, asked, "nothing was tried")

	require.ErrorIs(t, g.Reclaim(t.Context(), 600), errdefs.ErrFailedPrecondition, "it is not given")
	asked, err = g.read("memory.reclaim")
	require.NoError(t, err)
	require.Equal(t, "400", string(asked))
}

// What is to be written to a disk first is waited for.
func TestReclaimLater(t *testing.T) {
	t.Parallel()
	g := fake(t, map[string]string{"memory.current": "1000\n", "memory.stat": "inactive_file 900\n"})
	// The kernel's file is never seen empty.
	later := filepath.Join(t.TempDir(), "memory.current")
	require.NoError(t, os.WriteFile(later, []byte("300\n"), 0o600))
	time.AfterFunc(3*reclaimPause, func() { _ = os.Rename(later, filepath.Join(string(g), "memory.current")) })
	require.NoError(t, g.Reclaim(t.Context(), 400))

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, g.Reclaim(ctx, 200), context.Canceled)
}
