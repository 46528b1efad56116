// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

//go:build failpoints

package controller

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint/points"
)

// TestEachPointFails lets each side effect of the controller's verbs fail, with a driver and a
// network that are fakes: a retry succeeds, and nothing is left. What is real, and more than
// errors, is in e2e/faults; this one takes seconds.
func TestEachPointFails(t *testing.T) {
	all, err := points.All("..")
	require.NoError(t, err)
	lives := map[string]func(n *node) error{
		"create": start, "start": start, "boot": start, "move": start,
		"end": stop, "remove": stop, "update": update, "attach": attach, "recover": restart,
	}
	for _, p := range all {
		verb, _, _ := strings.Cut(string(p.Point), "/")
		life := lives[verb]
		if life == nil {
			continue
		}
		t.Run(string(p.Point), func(t *testing.T) {
			n := newNode(t)
			n.containers.sandbox["c1"] = "a"
			dir := t.TempDir()
			t.Setenv(failpoint.DirVariable, dir)
			if verb != "create" && verb != "start" && verb != "boot" && verb != "move" {
				n.run("a")
			}
			if prepare := recoversFrom[p.Point]; prepare != nil {
				prepare(n)
			}
			if first, ok := failsFirst[p.Point]; ok {
				require.NoError(t, os.WriteFile(filepath.Join(dir, first.File()), []byte(failpoint.Fail), 0o600))
				require.Error(t, life(n))
			}
			require.NoError(t, os.WriteFile(filepath.Join(dir, p.File()), []byte(failpoint.Fail), 0o600))
			err := life(n)
			if _, err := os.Lstat(filepath.Join(dir, p.File())); err == nil {
				t.Skip("nothing here comes to it")
			}
			if err != nil {
				require.ErrorContains(t, err, "failpoint "+string(p.Point))
				t.Logf("it failed: %v", err)
				if verb == "create" || verb == "start" || verb == "boot" {
					n.awaitForgotten("a")
				}
				require.NoError(t, life(n), "the retry")
			}
			if _, err := n.get("a"); err == nil && recoversFrom[p.Point] == nil && verb != "end" && verb != "remove" {
				state, cause := n.status("a")
				assert.Equal(t, "SANDBOX_READY", state, cause)
			}
			// A failure in the background may have left something for a while.
			require.Eventually(t, func() bool {
				err = n.Shutdown(n.ctx(), "a")
				return err == nil
			}, 5*time.Second, 10*time.Millisecond, "%v", err)
			n.awaitForgotten("a")
			require.Eventually(t, func() bool {
				_, err := os.Lstat(filepath.Join(n.cfg.StateDir, "a"))
				return errors.Is(err, fs.ErrNotExist)
			}, 5*time.Second, 10*time.Millisecond, "the directory")
			n.requireNothing()
		})
	}
}

// Damaged and missing records are for e2e/faults: here the old watchers would write them anew.
//
// recoversFrom are what leads to points of recovery.
var recoversFrom = map[failpoint.Point]func(n *node){
	failpoint.RecoverOrphan: func(n *node) { n.sandboxes.known = map[string]bool{} },
	failpoint.RecoverEnd:    func(n *node) { rewrite(n, "a", func(r *record) { r.State = StateStarting }) },
}

// failsFirst are the points that fail first, so that others are come to.
var failsFirst = map[failpoint.Point]failpoint.Point{failpoint.AttachUnplug: failpoint.AttachDone}

func start(n *node) error {
	if err := n.create("a"); err != nil && !errdefs.IsAlreadyExists(err) {
		return err
	}
	_, err := n.Start(n.ctx(), "a")
	return err
}

func stop(n *node) error {
	if err := n.Stop(n.ctx(), "a"); err != nil {
		return err
	}
	return n.Shutdown(n.ctx(), "a")
}

func attach(n *node) error {
	_, err := n.attachRootFS(n.ctx(), "a", "c1")
	return err
}

func update(n *node) error {
	for i, memory := range []int64{1 << 30, 600 << 20} {
		if err := n.fitContainers(n.ctx(), "a", []limits{{memory: memory}}, true, true); err != nil {
			return fmt.Errorf("update %d: %w", i, err)
		}
	}
	return nil
}

func restart(n *node) error {
	n.letGo()
	n.images.mu.Lock()
	n.images.pins = map[string]int{}
	n.images.mu.Unlock()
	n.Controller = n.controller()
	return n.Recover(n.t.Context())
}
