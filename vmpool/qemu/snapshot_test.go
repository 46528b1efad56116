// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package qemu

import (
	"bytes"
	"context"
	"crypto/sha256"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// template boots a VM, lets change act on it, and makes a snapshot of it.
func template(t *testing.T, change func(*testVM)) vmm.Snapshot {
	t.Helper()
	dir := t.TempDir()
	v := boot(t, func(c *vmm.Config) { c.MemoryFile = filepath.Join(dir, memoryName) })
	ctx := testContext(t)
	v.mustRun("cat /proc/version")
	if change != nil {
		change(v)
	}
	require.NoError(t, v.Disconnect(ctx))
	_, err := v.Snapshot(ctx)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition, "it runs")
	require.NoError(t, v.Pause(ctx))
	snap, err := v.Snapshot(ctx)
	require.NoError(t, err)
	require.NoError(t, v.Kill(ctx))
	return snap
}

// clone restores a snapshot.
func clone(t *testing.T, from vmm.Snapshot) *testVM {
	t.Helper()
	cfg := config(t)
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	vm, err := New("").Restore(ctx, cfg, from)
	require.NoError(t, err)
	v := &testVM{VM: vm, t: t, cfg: cfg}
	t.Cleanup(v.end)
	return v
}

func hashFile(t *testing.T, path string) [sha256.Size]byte {
	t.Helper()
	data, err := os.ReadFile(path)
	require.NoError(t, err)
	return sha256.Sum256(data)
}

// TestRestore makes clones, which share nothing but what the template left them,
// and can all that a VM can that was booted.
func TestRestore(t *testing.T) {
	snap := template(t, func(v *testVM) { v.mustRun("write /tmp/from-the-template yes") })
	before := hashFile(t, memoryPath(snap.Dir))
	ctx := testContext(t)
	a, b := clone(t, snap), clone(t, snap)
	for _, v := range []*testVM{a, b} {
		assert.Equal(t, "yes", v.mustRun("cat /tmp/from-the-template"))
	}
	a.mustRun("write /tmp/own a")
	b.mustRun("write /tmp/own b")
	a.mustRun("touch 64")
	assert.Equal(t, "a", a.mustRun("cat /tmp/own"))
	assert.Equal(t, "b", b.mustRun("cat /tmp/own"))

	// Hot-plug, growth and a second processor.
	image := filepath.Join(t.TempDir(), "image")
	content := bytes.Repeat([]byte("0123456789abcdef"), 4<<10)
	require.NoError(t, os.WriteFile(image, content, 0o600))
	require.NoError(t, a.AddDisk(ctx, vmm.Disk{Serial: "plugged", Path: image, ReadOnly: true}))
	assert.NotEmpty(t, a.awaitDisk("plugged"))
	memory := b.memory()
	require.NoError(t, b.Resize(ctx, vmm.Size{VCPUs: 2, MemoryBytes: 512 << 20}))
	b.eventually("cat /proc/meminfo", func(string) bool { return b.memory() > memory+300 })
	b.mustRun("write /sys/devices/system/cpu/cpu1/online 1")
	assert.Equal(t, "0-1", b.mustRun("cat /sys/devices/system/cpu/online"))

	// Whoever started it may go away.
	state := a.State()
	require.NoError(t, a.Close())
	again, err := New("").Attach(ctx, state)
	require.NoError(t, err)
	a.VM = again
	assert.Equal(t, "a", a.mustRun("cat /tmp/own"))
	assert.Equal(t, before, hashFile(t, memoryPath(snap.Dir)), "a template never changes")
}

// TestRestoreRefuses tries what is no snapshot.
func TestRestoreRefuses(t *testing.T) {
	snap := template(t, nil)
	for name, spoil := range map[string]func(t *testing.T, path string){
		"missing state":   func(t *testing.T, path string) { require.NoError(t, os.Remove(path)) },
		"empty state":     func(t *testing.T, path string) { require.NoError(t, os.Truncate(path, 0)) },
		"truncated state": func(t *testing.T, path string) { require.NoError(t, os.Truncate(path, 100<<10)) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			require.NoError(t, os.Link(memoryPath(snap.Dir), memoryPath(dir)))
			data, err := os.ReadFile(filepath.Join(snap.Dir, stateName))
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(filepath.Join(dir, stateName), data, 0o600))
			spoil(t, filepath.Join(dir, stateName))
			ctx, cancel := context.WithTimeout(context.Background(), limit)
			defer cancel()
			cfg := config(t)
			bad := snap
			bad.Dir = dir
			_, err = New("").Restore(ctx, cfg, bad)
			require.Error(t, err)
			t.Log(err)
			require.NoError(t, ctx.Err(), "it must not wait")
			left, err := os.ReadDir(cfg.Dir)
			require.NoError(t, err)
			for _, e := range left {
				assert.Contains(t, []string{vmm.ConsoleLog, vmm.VMMLog}, e.Name())
			}
		})
	}
	_, err := New("").Restore(t.Context(), config(t), vmm.Snapshot{Driver: "other"})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}
