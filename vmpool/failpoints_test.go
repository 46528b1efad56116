// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

//go:build failpoints

package vmpool

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint/points"
)

// TestEachPointFails lets each side effect of the pool fail, with a driver that is a fake: the
// pool is full again, pods are served, and nothing is left. What is real is in e2e/faults.
func TestEachPointFails(t *testing.T) {
	all, err := points.All("..")
	require.NoError(t, err)
	for _, p := range all {
		verb, _, _ := strings.Cut(string(p.Point), "/")
		life := map[string]func(r *rig) error{
			"vm": refill, "refill": refill, "handover": refill, "discard": drain, "snapshot": rebuild, "recover": restart,
		}[verb]
		if life == nil {
			continue
		}
		t.Run(string(p.Point), func(t *testing.T) {
			r := newRig(t)
			r.full(2)
			dir := t.TempDir()
			t.Setenv(failpoint.DirVariable, dir)
			require.NoError(t, os.WriteFile(filepath.Join(dir, p.File()), []byte(failpoint.Fail), 0o600))
			err := life(r)
			if _, err := os.Lstat(filepath.Join(dir, p.File())); err == nil {
				t.Skip("nothing here comes to it")
			}
			if err != nil {
				require.ErrorContains(t, err, "failpoint "+string(p.Point))
				t.Logf("it failed: %v", err)
				require.NoError(t, life(r), "the retry")
			}
			r.full(2)
			require.NoError(t, refill(r))
			r.left(2)
			making, err := filepath.Glob(filepath.Join(r.dir, "snapshots", ".making-*"))
			require.NoError(t, err)
			require.Empty(t, making)
		})
	}
}

// refill serves a pod, and waits until the pool is full.
func refill(r *rig) error {
	vm, err := r.pool.Acquire(r.t.Context(), Request{Owner: "a"})
	if err == nil {
		vm.Settled()
		err = r.pool.Discard(r.t.Context(), vm)
	}
	if err == nil {
		r.full(2)
	}
	return err
}

func drain(r *rig) error {
	r.pool.Drain()
	r.left(0)
	r.pool.Fill()
	r.full(2)
	return nil
}

func rebuild(r *rig) error {
	if _, err := r.pool.Rebuild(r.t.Context()); err != nil {
		return err
	}
	r.eventually("the old one has gone", func(Status) bool {
		entries, err := os.ReadDir(filepath.Join(r.dir, "snapshots"))
		return err == nil && len(entries) == 1
	})
	return nil
}

func restart(r *rig) error {
	r.restart()
	return nil
}
