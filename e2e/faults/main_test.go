// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package faults

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmmtest"
)

const (
	// censusLimit is how long it may take until nothing is left.
	censusLimit = 5 * time.Second
	// restLimit is how long a pool may take to be full, and a node to start.
	restLimit = 2 * time.Minute
)

// world is a node under test, with its armed points.
type world struct {
	*testnode.Node
	armory
	t *testing.T
	// volume is a directory of the host's that containers mount.
	volume string
	// disk is a block device of the host's.
	disk string
	// ready is how many VMs are ready when the node is at rest.
	ready int

	// before is the census of the node at rest; own is that of this containerd.
	before testnode.Census

	mu sync.Mutex
	// deaths counts the containerds that ended.
	deaths int
}

// helper is the tests' program, compiled once.
var helper = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "faults")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	repo, err := testnode.FindRepo()
	if err != nil {
		return nil, err
	}
	return testimage.BuildHelper(repo, dir)
})

// newWorld starts a node whose binaries have failpoints, and brings it to rest.
func newWorld(t *testing.T, ready int, cfg map[string]any, change ...func(*testnode.Options)) *world {
	t.Helper()
	w := &world{t: t, ready: ready}
	w.dir = tempDir(t)
	all := map[string]any{
		"base_memory": "128MiB", "default_memory": "128MiB", "memory_overhead": "32MiB",
		"pool": map[string]any{"min": ready, "max": ready},
	}
	maps.Copy(all, cfg)
	address, err := testnode.FreeAddress()
	require.NoError(t, err)
	opts := testnode.Options{
		Name: cmp.Or(os.Getenv("E2E_NAME"), "e2e") + "fp", GuestDir: os.Getenv("E2E_GUEST"), Debug: os.Getenv("E2E_DEBUG") == "1",
		CloudHV: all, Env: []string{failpoint.DirVariable + "=" + w.dir}, Metrics: address,
	}
	for _, c := range change {
		c(&opts)
	}
	requireFit(t, &opts)
	w.Node, err = testnode.New(opts)
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, w.disarm())
		if t.Failed() && os.Getenv("E2E_KEEP") == "1" {
			t.Log("the node is left in", w.Dir())
			return
		}
		ctx, cancel := limit(time.Minute)
		defer cancel()
		require.NoError(t, w.Close(ctx))
	})
	w.volume = tempDir(t)
	require.NoError(t, os.Chmod(w.volume, 0o755)) //nolint:gosec // containers read it
	require.NoError(t, os.WriteFile(filepath.Join(w.volume, "hello"), []byte("hello\n"), 0o644))
	w.disk, _ = vmmtest.LoopDevice(t, 1<<20, 512, false)
	w.warmUp()
	ctx, cancel := limit(time.Minute)
	defer cancel()
	_, err = w.Hypervisor(ctx)
	require.NoError(t, err)
	return w
}

// tempDir is a directory with a short name, which goes when the test ends.
func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "chv-faults")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	return dir
}

// requireFit skips the test with the reason, or fails, where it cannot run.
func requireFit(t *testing.T, opts *testnode.Options) {
	t.Helper()
	repo, err := testnode.FindRepo()
	require.NoError(t, err)
	opts.BinDir = filepath.Join(cmp.Or(os.Getenv("E2E_BIN"), filepath.Join(repo, "build", "bin")), "failpoints")
	var reasons []string
	if os.Geteuid() != 0 {
		reasons = append(reasons, "root is needed")
	}
	if strings.Contains(os.Getenv("E2E_HANDLERS"), testnode.RunC) && !strings.Contains(os.Getenv("E2E_HANDLERS"), testnode.CloudHV) {
		reasons = append(reasons, "E2E_HANDLERS leaves cloudhv out")
	}
	missing, err := testnode.Missing(*opts)
	require.NoError(t, err)
	if len(missing) > 0 {
		reasons = append(reasons, "`make failpoints` has not made "+strings.Join(missing, ", "))
	}
	if len(reasons) == 0 {
		return
	}
	if os.Getenv("E2E_REQUIRE") == "1" {
		require.Fail(t, strings.Join(reasons, "; "))
	}
	t.Skip(strings.Join(reasons, "; "))
}

func limit(d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), testnode.Scale(d))
}

// warmUp makes what is made once a node, and takes the census of the node at rest.
func (w *world) warmUp() {
	t := w.t
	t.Helper()
	ctx, cancel := limit(restLimit)
	defer cancel()
	require.NoError(t, w.Start(ctx), w.LogTail(4000))
	program, err := helper()
	require.NoError(t, err)
	img, err := testimage.Helper(program)
	require.NoError(t, err)
	require.NoError(t, w.Import(ctx, testimage.HelperRef, img))
	require.NoError(t, w.AwaitSnapshot(ctx), w.LogTail(4000))
	require.NoError(t, w.rest(ctx), w.LogTail(4000))
	k := newKubelet(w.Node, "warm-up", w.volume)
	require.NoError(t, k.up(updated), w.LogTail(4000))
	require.NoError(t, k.down(), w.LogTail(4000))
	// A first containerd has what later ones do not.
	require.NoError(t, w.Restart(ctx, false))
	k = newKubelet(w.Node, "warm-up", w.volume)
	require.NoError(t, k.up(updated), w.LogTail(4000))
	require.NoError(t, k.down(), w.LogTail(4000))
	w.before, err = w.settled(ctx)
	require.NoError(t, err)
}

// rest waits until the pool is as it should be.
func (w *world) rest(ctx context.Context) error {
	return testnode.Eventually(ctx, func(ctx context.Context) error {
		m, err := w.Metrics(ctx)
		if err != nil {
			return err
		}
		const prefix = "containerd_cloudhv_"
		depth, making, usable := m[prefix+"pool_depth"], m[prefix+`vms{state="making"}`], m[prefix+"pool_snapshot_usable"]
		if int(depth) != w.ready || making != 0 || usable != 1 {
			return fmt.Errorf("the pool has %v VMs ready and makes %v, and its snapshot is usable: %v: want %d ready", depth, making, usable == 1, w.ready)
		}
		return nil
	})
}

// settled returns the first census that is the same twice in a row.
func (w *world) settled(ctx context.Context) (testnode.Census, error) {
	var last testnode.Census
	err := testnode.Eventually(ctx, func(ctx context.Context) error {
		now, err := w.Census(ctx)
		if err != nil {
			return err
		}
		d := now.Diff(last)
		last = now
		if len(d) > 0 {
			return fmt.Errorf("the node does not come to rest: %s", strings.Join(d, "; "))
		}
		return nil
	})
	return last, err
}

// clean fails if anything is left within censusLimit of the node's being at rest.
func (w *world) clean() error {
	ctx, cancel := limit(restLimit)
	defer cancel()
	if err := w.rest(ctx); err != nil {
		return err
	}
	aside, err := filepath.Glob(w.Dir("cache", "templates", "*.damaged")) // kept for people
	if err != nil {
		return err
	}
	// A bundle that containerd was deleting when it was killed it passes over from then on, runc's
	// as well as ours (atomicDelete and loadShims of its core/runtime/v2).
	halfway, err := filepath.Glob(w.Dir("state", "io.containerd.runtime.v2.task", "*", ".*"))
	if err != nil {
		return err
	}
	for _, dir := range slices.Concat(aside, halfway, []string{filepath.Join(w.StateDir(), "damaged")}) {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	if err != nil {
		return err
	}
	if err := w.removeForeignLeases(ctx); err != nil {
		return err
	}
	ctx, cancel = limit(censusLimit)
	defer cancel()
	return testnode.Eventually(ctx, func(ctx context.Context) error {
		now, err := w.Census(ctx)
		if err != nil {
			return err
		}
		d := slices.DeleteFunc(now.DiffAnyProcess(w.before), func(line string) bool {
			// containerd collects its garbage when it likes: there may have been some before.
			return strings.HasPrefix(line, "-") && strings.Contains(line, "io.containerd.snapshotter") || w.ready > 0 && ofReadyVM(line)
		})
		if len(d) > 0 {
			return fmt.Errorf("is left:\n\t%s", strings.Join(d, "\n\t"))
		}
		return nil
	})
}

// ourLease is the label of a lease of our own.
const ourLease = "io.cloudhv.rootfs"

// removeForeignLeases removes those of containerd that it leaves if it is killed while it makes something,
// by any runtime: CRI's of a sandbox, until that has a record (RunPodSandbox), and the client's
// of a container, for a day (Client.WithLease). There are no pods.
func (w *world) removeForeignLeases(ctx context.Context) error {
	ctx = w.Context(ctx)
	svc := w.Containerd().LeasesService()
	list, err := svc.List(ctx)
	for _, l := range list {
		if _, ours := l.Labels[ourLease]; !ours {
			err = errors.Join(err, svc.Delete(ctx, l))
		}
	}
	return err
}

// ofReadyVM tells whether a line of a census is of a difference between a ready VM that this containerd
// has made and one that it has taken up: it has talked to the one, and has started its process. A
// snapshot that was made anew may be a little larger than the one before, or smaller.
func ofReadyVM(line string) bool {
	if !strings.HasPrefix(line, "+1 ") && !strings.HasPrefix(line, "-1 ") {
		return false
	}
	return slices.ContainsFunc([]string{
		"goroutine github.com/hashicorp/yamux.(*Session).", "goroutine sync.(*WaitGroup).Go.func1", "open file anon_inode:[pidfd]", "open file socket:", "16 MiB of cache/templates/",
	}, func(s string) bool { return strings.HasPrefix(line[len("+1 "):], s) })
}

// heal starts containerd again if it has ended. It gives one that is about to end time for it.
func (w *world) heal(grace time.Duration) (died bool, _ error) {
	if w.Pid() != 0 { // else its start has failed
		timer := time.NewTimer(grace)
		defer timer.Stop()
		select {
		case <-w.Ended():
		case <-timer.C:
			return false, nil
		}
	}
	ctx, cancel := limit(restLimit)
	defer cancel()
	w.mu.Lock()
	w.deaths++
	w.mu.Unlock()
	if err := w.Kill(ctx); err != nil { // it is known then that it has ended
		return true, err
	}
	return true, w.Start(ctx)
}

// renew begins anew after something was left, so that it is not counted again: all pods go,
// and what is then there is how the node is at rest.
func (w *world) renew() {
	ctx, cancel := limit(restLimit)
	defer cancel()
	if err := w.RemoveAllPods(ctx); err != nil {
		w.t.Log(err)
	}
	if err := w.Restart(ctx, false); err != nil {
		w.t.Log(err)
	}
	if now, err := w.settled(ctx); err == nil {
		w.before = now
	}
}
