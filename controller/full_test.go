// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// fill leaves no room on the file system of dir.
func fill(t *testing.T, dir string) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(dir, "ballast"), os.O_CREATE|os.O_WRONLY, 0o600)
	require.NoError(t, err)
	defer f.Close()
	for err == nil {
		_, err = f.Write(make([]byte, 4<<10))
	}
	require.ErrorIs(t, err, unix.ENOSPC)
}

// With no room for its record a pod can still be stopped and removed, which is
// what makes room.
func TestPodsCanBeRemovedFromAFullDisk(t *testing.T) {
	n := newNode(t)
	err := unix.Mount("tmpfs", n.cfg.StateDir, "tmpfs", 0, "size=512k")
	if errors.Is(err, unix.EPERM) {
		t.Skip("mounting a small file system needs root")
	}
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, unix.Unmount(n.cfg.StateDir, unix.MNT_DETACH)) })
	n.run("ready")
	n.run("dies")
	require.NoError(t, n.create("created"))
	p, err := n.get("dies")
	require.NoError(t, err)
	fill(t, n.cfg.StateDir)

	require.ErrorIs(t, n.create("new"), errdefs.ErrInternal)
	require.NoDirExists(t, filepath.Join(n.cfg.StateDir, "new"))
	_, err = n.Start(n.ctx(), "created")
	require.ErrorIs(t, err, unix.ENOSPC)
	_, err = n.Status(n.ctx(), "created", false)
	require.ErrorIs(t, err, errdefs.ErrNotFound, "CRI calls nothing after a Start that failed")

	// What that freed is filled again.
	require.NoError(t, os.Remove(filepath.Join(n.cfg.StateDir, "ballast")))
	fill(t, n.cfg.StateDir)
	for _, m := range n.machines() {
		if m.cfg.ID == p.id {
			m.die("x", false)
		}
	}
	_, err = n.Wait(n.ctx(), p.id)
	require.NoError(t, err)
	require.NoError(t, n.Stop(n.ctx(), "ready"))
	state, _ := n.status("ready")
	require.Equal(t, notReady, state)
	require.NoError(t, n.Shutdown(n.ctx(), "ready"))
	require.NoError(t, n.Shutdown(n.ctx(), p.id))
	require.NoError(t, os.Remove(filepath.Join(n.cfg.StateDir, "ballast")))
	n.requireNothing()
}

// The record of a pod that ended on a full disk says that it is ready.
func TestRecoveryFromAnOlderRecord(t *testing.T) {
	n := newNode(t)
	p := n.run("a")
	old, err := os.ReadFile(p.file(recordFile))
	require.NoError(t, err)
	require.NoError(t, n.Stop(n.ctx(), "a"))
	require.NoError(t, os.WriteFile(p.file(recordFile), old, 0o600))
	n.restart()
	state, cause := n.status("a")
	require.Equal(t, notReady, state)
	require.Contains(t, cause, "the VM ended while containerd was away")
	require.NoError(t, n.Shutdown(n.ctx(), "a"))
	n.requireNothing()
}
