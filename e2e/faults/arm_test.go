// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package faults

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
)

// armory is the directory of armed points.
type armory struct{ dir string }

// arm arms a point, once.
func (a *armory) arm(p failpoint.Point, action string) error {
	tmp := filepath.Join(a.dir, ".arming")
	if err := os.WriteFile(tmp, []byte(action), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(a.dir, p.File()))
}

// reached tells whether somebody has come to a point since it was armed, and has not been
// released.
func (a *armory) reached(p failpoint.Point) bool {
	_, err := os.Lstat(filepath.Join(a.dir, p.Reached()))
	return err == nil
}

// armed tells whether nobody has come to a point yet.
func (a *armory) armed(p failpoint.Point) bool {
	_, err := os.Lstat(filepath.Join(a.dir, p.File()))
	return err == nil
}

// release lets whoever hangs at a point go on.
func (a *armory) release(p failpoint.Point) error {
	err := os.Remove(filepath.Join(a.dir, p.Reached()))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// disarm disarms all points, and lets all go on that hang.
func (a *armory) disarm() error {
	entries, err := os.ReadDir(a.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.Remove(filepath.Join(a.dir, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// await waits until somebody comes to a point, or ctx ends.
func (a *armory) await(ctx context.Context, p failpoint.Point) bool {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		if a.reached(p) {
			return true
		}
		select {
		case <-ctx.Done():
			return a.reached(p)
		case <-tick.C:
		}
	}
}

// Actions that a test takes itself, while somebody hangs at a point.
const (
	killVMM        = "kill-vmm"
	killShim       = "kill-shim"
	killContainerd = "kill-containerd"
)

// inShim is true for points that a shim comes to.
func inShim(p failpoint.Point) bool {
	return strings.HasPrefix(string(p), "task-") || strings.HasPrefix(string(p), "exec/")
}

// errNobody tells that there was no process to kill.
var errNobody = errors.New("there is none to kill at this point")

// kill kills all processes of a kind on a node.
func kill(n *testnode.Node, action string) error {
	prefixes := map[string][]string{
		killVMM:  {"qemu-system", "cloud-hyperviso"},
		killShim: {"containerd-shim"},
	}[action]
	ctx, cancel := context.WithTimeout(context.Background(), testnode.Scale(10*time.Second))
	defer cancel()
	if action == killContainerd {
		return testnode.Kill9(ctx, n.Pid())
	}
	pids, err := n.Processes(prefixes...)
	if err != nil {
		return err
	}
	if len(pids) == 0 {
		return fmt.Errorf("%s: %w", action, errNobody)
	}
	var errs []error
	for _, pid := range pids {
		errs = append(errs, testnode.Kill9(ctx, pid))
	}
	return errors.Join(errs...)
}
