// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmmtest

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const echoPort = 7

func newFake(t *testing.T) *Driver {
	d := New()
	d.Handle(echoPort, func(c net.Conn) { _, _ = io.Copy(c, c) })
	t.Cleanup(d.Stop)
	return d
}

func config(t *testing.T) vmm.Config {
	t.Helper()
	dir, err := os.MkdirTemp("", "vm")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	file := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	return vmm.Config{
		ID: filepath.Base(dir), Dir: dir, Kernel: file, RootFS: file, Scratch: file, ConsoleLimit: 64 << 10,
		Size: vmm.Size{VCPUs: 1, MemoryBytes: 128 << 20}, Max: vmm.Size{VCPUs: 2, MemoryBytes: 1 << 30},
	}
}

func TestFakeKeepsTheContract(t *testing.T) {
	Run(t, Suite{
		Driver: newFake(t), Config: config, EchoPort: echoPort, Limit: 20 * time.Second,
		TAP: func(t *testing.T) []*os.File {
			f, err := os.Open(os.DevNull)
			require.NoError(t, err)
			return []*os.File{f}
		},
	})
}

func TestFakeObeys(t *testing.T) {
	t.Parallel()
	d := newFake(t)
	ctx := context.Background()
	broken := errors.New("no room")

	d.Fail(OpBoot, broken)
	_, err := d.Boot(ctx, config(t))
	require.ErrorIs(t, err, broken)
	d.Fail(OpBoot, nil)
	vm, err := d.Boot(ctx, config(t))
	require.NoError(t, err)
	defer vm.Close() //nolint:errcheck

	d.FailFunc(OpAddDisk, func(id string) error {
		if id == vm.ID() {
			return broken
		}
		return nil
	})
	disk := vmm.Disk{Serial: "a", Path: config(t).Kernel}
	_, err = vm.AddDisk(ctx, disk)
	require.ErrorIs(t, err, broken)
	d.Fail(OpAddDisk, nil)
	_, err = vm.AddDisk(ctx, disk)
	require.NoError(t, err)
	seen, ok := d.Seen(vm.ID())
	require.True(t, ok)
	assert.Equal(t, []vmm.Disk{disk}, seen.Disks)

	d.Hang(OpResize)
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, vm.Resize(short, vmm.Size{VCPUs: 2, MemoryBytes: 128 << 20}), context.DeadlineExceeded)
	hung := make(chan error, 1)
	go func() { hung <- vm.Resize(ctx, vmm.Size{VCPUs: 2, MemoryBytes: 128 << 20}) }()
	d.PowerOff(vm.ID())
	require.ErrorIs(t, <-hung, errdefs.ErrUnavailable)
	assert.True(t, vm.Exit().Requested)
	assert.Equal(t, "guest powered off", vm.Exit().Cause)
	assert.Empty(t, d.VMs())
	assert.Contains(t, d.Calls(), "boot "+vm.ID())
}

func TestFakeSnapshots(t *testing.T) {
	t.Parallel()
	d := newFake(t)
	ctx := context.Background()
	cfg := config(t)
	cfg.MemoryFile = filepath.Join(t.TempDir(), "memory")
	vm, err := d.Boot(ctx, cfg)
	require.NoError(t, err)
	defer vm.Close() //nolint:errcheck
	_, err = vm.Snapshot(ctx)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.NoError(t, vm.Pause(ctx))
	snap, err := vm.Snapshot(ctx)
	require.NoError(t, err)
	clone, err := d.Restore(ctx, config(t), snap)
	require.NoError(t, err)
	defer clone.Close() //nolint:errcheck
	conn, err := clone.Dial(ctx, echoPort)
	require.NoError(t, err)
	require.NoError(t, conn.Close())
}
