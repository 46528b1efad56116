// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package realvm

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

// Template boots a VM, lets change act on it, and makes a snapshot of it.
func (s *Suite) Template(t *testing.T, change func(*VM)) vmm.Snapshot {
	t.Helper()
	dir := Dir(t)
	v := s.Boot(t, func(c *vmm.Config) { c.MemoryFile = MemoryPath(dir) })
	ctx := Context(t)
	v.MustRun("cat /proc/version")
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

// Clone restores a snapshot.
func (s *Suite) Clone(t *testing.T, from vmm.Snapshot) *VM {
	t.Helper()
	cfg := s.Config(t)
	ctx, cancel := context.WithTimeout(context.Background(), Limit)
	defer cancel()
	vm, err := s.Driver.Restore(ctx, cfg, from)
	require.NoError(t, err)
	return Take(t, vm, cfg)
}

// MemoryPath is the RAM of a snapshot.
func MemoryPath(dir string) string { return filepath.Join(dir, "memory") }

// HashFile hashes a file.
func HashFile(t *testing.T, path string) [sha256.Size]byte {
	t.Helper()
	data, err := os.ReadFile(path)
	require.NoError(t, err)
	return sha256.Sum256(data)
}

// restore makes clones, which share nothing but what the template left them,
// and can all that a VM can that was booted.
func (s *Suite) restore(t *testing.T) {
	snap := s.Template(t, func(v *VM) { v.MustRun("write /tmp/from-the-template yes") })
	before := HashFile(t, MemoryPath(snap.Dir))
	ctx := Context(t)
	a, b := s.Clone(t, snap), s.Clone(t, snap)
	for _, v := range []*VM{a, b} {
		assert.Equal(t, "yes", v.MustRun("cat /tmp/from-the-template"))
	}
	a.MustRun("write /tmp/own a")
	b.MustRun("write /tmp/own b")
	a.MustRun("touch 64")
	assert.Equal(t, "a", a.MustRun("cat /tmp/own"))
	assert.Equal(t, "b", b.MustRun("cat /tmp/own"))

	// Hot-plug, growth and a second processor.
	image := filepath.Join(t.TempDir(), "image")
	content := bytes.Repeat([]byte("0123456789abcdef"), 4<<10)
	require.NoError(t, os.WriteFile(image, content, 0o600))
	a.Add(vmm.Disk{Serial: "plugged", Path: image})
	assert.NotEmpty(t, a.AwaitDisk("plugged"))
	memory := b.Memory()
	require.NoError(t, b.Resize(ctx, vmm.Size{VCPUs: 2, MemoryBytes: 512 << 20}))
	b.Eventually("cat /proc/meminfo", func(string) bool { return b.Memory() > memory+300 })
	b.Eventually("write /sys/devices/system/cpu/cpu1/online 1", func(string) bool { return true })
	assert.Equal(t, "0-1", b.MustRun("cat /sys/devices/system/cpu/online"))

	// Whoever started it may go away.
	state := a.State()
	require.NoError(t, a.Close())
	again, err := s.Driver.Attach(ctx, state)
	require.NoError(t, err)
	a.VM = again
	assert.Equal(t, "a", a.MustRun("cat /tmp/own"))
	assert.Equal(t, before, HashFile(t, MemoryPath(snap.Dir)), "a template never changes")
}

// restoreRefuses tries what is no snapshot.
func (s *Suite) restoreRefuses(t *testing.T) {
	snap := s.Template(t, nil)
	for name, spoil := range map[string]func(t *testing.T, path string){
		"missing state":   func(t *testing.T, path string) { require.NoError(t, os.Remove(path)) },
		"empty state":     func(t *testing.T, path string) { require.NoError(t, os.Truncate(path, 0)) },
		"truncated state": func(t *testing.T, path string) { require.NoError(t, os.Truncate(path, 100<<10)) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := Dir(t)
			require.NoError(t, os.Link(MemoryPath(snap.Dir), MemoryPath(dir)))
			data, err := os.ReadFile(filepath.Join(snap.Dir, s.StateFile))
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(filepath.Join(dir, s.StateFile), data, 0o600))
			spoil(t, filepath.Join(dir, s.StateFile))
			ctx, cancel := context.WithTimeout(context.Background(), Limit)
			defer cancel()
			cfg := s.Config(t)
			bad := snap
			bad.Dir = dir
			_, err = s.Driver.Restore(ctx, cfg, bad)
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
	_, err := s.Driver.Restore(t.Context(), s.Config(t), vmm.Snapshot{Driver: "other"})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}
