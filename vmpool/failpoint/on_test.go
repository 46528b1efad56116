// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

//go:build failpoints

package failpoint

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestAt arms a point in each way that the process survives.
func TestAt(t *testing.T) {
	dir := t.TempDir()
	const p = CreateDir
	require.NoError(t, At(t.Context(), p), "without the variable")
	t.Setenv(DirVariable, dir)
	assert.Equal(t, []string{DirVariable + "=" + dir}, Env())
	arm := func(action string) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, p.File()), []byte(action), 0o600))
	}
	require.NoError(t, At(t.Context(), p), "nobody has armed it")

	arm(Fail)
	require.NoError(t, At(t.Context(), CreateRecord), "another point")
	err := At(t.Context(), p)
	require.ErrorIs(t, err, ErrInjected)
	require.ErrorContains(t, err, "failpoint create/dir")
	require.NoError(t, At(t.Context(), p), "it is armed once")

	arm(Refuse)
	require.True(t, errdefs.IsResourceExhausted(At(t.Context(), p)))
	arm(Panic)
	require.PanicsWithValue(t, "failpoint create/dir", func() { _ = At(t.Context(), p) })
	arm("nonsense")
	require.Panics(t, func() { _ = At(t.Context(), p) })

	arm(Hang)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, At(ctx, p), context.DeadlineExceeded)
	require.NoError(t, os.Remove(filepath.Join(dir, p.Reached())))
	arm(Hang)
	done := make(chan error)
	go func() { done <- At(context.Background(), p) }()
	require.Eventually(t, func() bool { return os.Remove(filepath.Join(dir, p.Reached())) == nil }, time.Minute, time.Millisecond)
	require.NoError(t, <-done)
}
