// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
	"github.com/cloudhv/containerd-cloudhv/vmpool/snapshot"
)

// smallVM makes templates small, for tests that make many.
const smallVM = "128MiB"

// faultNode is a node of its own whose pool has faults.
type faultNode struct {
	*testnode.Node
	t       *testing.T
	address string
	// templates is where its snapshots are.
	templates string
}

// newFaultNode starts a node with one ready VM at most, unless the configuration
// says otherwise.
func newFaultNode(t *testing.T, cfg, pool map[string]any) *faultNode {
	t.Helper()
	address := freeAddress(t)
	all := map[string]any{"base_memory": smallVM, "default_memory": smallVM, "pool": pool}
	maps.Copy(all, cfg)
	n := ownNode(t, all, func(o *testnode.Options) { o.Metrics = address })
	f := &faultNode{Node: n, t: t, address: address, templates: n.Dir("cache", "templates")}
	if dir, ok := pool["template_dir"].(string); ok {
		f.templates = dir
	}
	return f
}

// image brings in what the pods run.
func (f *faultNode) image() {
	f.t.Helper()
	img, err := testimage.Helper(suite.helper)
	require.NoError(f.t, err)
	require.NoError(f.t, f.Import(testContext(f.t), testimage.HelperRef, img))
}

// metric is a value of the moment.
func (f *faultNode) metric(name string, labels ...string) float64 {
	f.t.Helper()
	return sample(f.t, scrape(f.t, f.address), name, labels...)
}

// await waits until something is so.
func (f *faultNode) await(what string, is func() bool) {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(testContext(f.t), testnode.Scale(2*time.Minute))
	defer cancel()
	err := testnode.Eventually(ctx, func(context.Context) error {
		if is() {
			return nil
		}
		return errors.New(what)
	})
	require.NoError(f.t, err, f.LogTail(6000))
}

// awaitRest waits until there is a snapshot, so many VMs are ready, and no failure is
// left to make good.
func (f *faultNode) awaitRest(ready int) {
	f.t.Helper()
	f.await(fmt.Sprintf("%d VMs are not ready", ready), func() bool {
		m := scrape(f.t, f.address)
		return sample(f.t, m, "pool_depth") == float64(ready) && sample(f.t, m, "vms", "making") == 0 &&
			sample(f.t, m, "pool_snapshot_usable") == 1 && sample(f.t, m, "pool_consecutive_failures") == 0
	})
}

// census is the node's when it is at rest.
func (f *faultNode) census() testnode.Census {
	f.t.Helper()
	c, err := settled(testContext(f.t), f.Node)
	require.NoError(f.t, err)
	return c
}

// awaitCensus waits until nothing is left but the snapshot that was set aside, which
// is kept for people.
func (f *faultNode) awaitCensus(before testnode.Census) {
	f.t.Helper()
	aside, err := filepath.Glob(filepath.Join(f.templates, "*.damaged"))
	require.NoError(f.t, err)
	for _, dir := range aside {
		require.NoError(f.t, os.RemoveAll(dir))
	}
	require.NoError(f.t, f.AwaitCensus(testContext(f.t), before), f.LogTail(3000))
}

// serves runs a pod with a container in it, and removes it. It returns how the pod
// came by its VM.
func (f *faultNode) serves() string {
	f.t.Helper()
	began := time.Now()
	p := podOn(f.t, f.Node)
	outcome := p.info().Outcome
	assert.Equal(f.t, "served\n", p.idle("box").sh("echo served"))
	f.t.Logf("a pod was served (%s) within %s", outcome, time.Since(began).Round(time.Millisecond))
	p.remove()
	require.NoError(f.t, os.RemoveAll(p.cfg.GetLogDirectory()))
	return outcome
}

// requireLog looks for words of containerd's log, in any case.
func (f *faultNode) requireLog(words string) {
	f.t.Helper()
	log, err := os.ReadFile(f.LogPath())
	require.NoError(f.t, err)
	require.Contains(f.t, strings.ToLower(string(log)), strings.ToLower(words))
}

// poolVM is what the record of a VM of the pool says.
type poolVM struct {
	ID    string `json:"id"`
	Key   string `json:"key"`
	Ready bool   `json:"ready"`
	Owner string `json:"owner"`
	VM    *struct {
		Pid int    `json:"pid"`
		Dir string `json:"dir"`
	} `json:"vm"`
}

// vms are those of the pool's VMs that have a process.
func (f *faultNode) vms(which func(poolVM) bool) []poolVM {
	f.t.Helper()
	files, err := filepath.Glob(filepath.Join(f.StateDir(), ".vms", "*", "vm.json"))
	require.NoError(f.t, err)
	var list []poolVM
	for _, path := range files {
		data, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		require.NoError(f.t, err)
		var vm poolVM
		require.NoError(f.t, json.Unmarshal(data, &vm))
		if vm.VM != nil && which(vm) {
			list = append(list, vm)
		}
	}
	return list
}

func isTemplate(vm poolVM) bool { return vm.Key == "" }

func isReady(vm poolVM) bool { return vm.Ready && vm.Owner == "" }

// ready is the one VM that is.
func (f *faultNode) ready() poolVM {
	f.t.Helper()
	list := f.vms(isReady)
	require.Len(f.t, list, 1)
	return list[0]
}

// awaitMaking waits until a template runs, and returns it.
func (f *faultNode) awaitMaking() (vm poolVM) {
	f.t.Helper()
	f.await("no template is being made", func() bool {
		made, _ := filepath.Glob(filepath.Join(f.templates, ".making-*", "memory"))
		list := f.vms(isTemplate)
		if len(made) == 0 || len(list) == 0 {
			return false
		}
		vm = list[0]
		return true
	})
	return vm
}

// snapshotFile is a file of the one snapshot in use.
func (f *faultNode) snapshotFile(name string) string {
	f.t.Helper()
	found, err := filepath.Glob(filepath.Join(f.templates, strings.Repeat("[0-9a-f]", 32), name))
	require.NoError(f.t, err)
	require.Len(f.t, found, 1)
	return found[0]
}

// TestSnapshotFaults spoils the making of a snapshot, and snapshots, in each way. Pods
// are served all the while.
func TestSnapshotFaults(t *testing.T) {
	f := newFaultNode(t, nil, map[string]any{"min": 1, "max": 1})
	template := f.awaitMaking()
	require.NoError(t, f.Kill(testContext(t)))
	assert.NoError(t, unix.Kill(template.VM.Pid, 0), "the template outlives containerd, half made")
	require.NoError(t, f.Start(testContext(t)))
	f.image()
	assert.Equal(t, "cold", f.serves())
	f.awaitRest(1)
	require.ErrorIs(t, unix.Kill(template.VM.Pid, 0), unix.ESRCH)
	before := f.census()

	t.Run("template dies", func(t *testing.T) {
		require.NoError(t, os.Truncate(f.snapshotFile("state*"), 1000))
		served := make(chan string, 1)
		go func() {
			defer close(served)
			served <- f.serves()
		}()
		require.NoError(t, testnode.Kill9(testContext(t), f.awaitMaking().VM.Pid))
		assert.Equal(t, "cold", <-served, "no VM of a snapshot that was changed is handed out")
		f.await("the failure is not counted", func() bool { return f.metric("pool_failures_total", "snapshot") > 0 })
		f.serves()
		f.awaitRest(1)
		f.requireLog("a snapshot is damaged; it is set aside and made anew")
		f.requireLog("the pool cannot be filled; pods boot or restore their VMs")
		assert.Equal(t, "hit", f.serves())
		f.awaitRest(1)
		f.awaitCensus(before)
	})
	for name, spoil := range map[string]func(){
		"altered memory": func() { overwrite(t, f.snapshotFile("memory"), 1<<20) },
		"other version": func() {
			replace(t, f.snapshotFile("manifest.json"), fmt.Sprintf(`"format":%d`, snapshot.Format), `"format":99`)
		},
	} {
		t.Run(name, func(t *testing.T) {
			old := f.ready()
			require.NoError(t, f.Stop(testContext(t)))
			spoil()
			require.NoError(t, f.Start(testContext(t)))
			f.serves()
			f.awaitRest(1)
			assert.NotEqual(t, old.ID, f.ready().ID, "a ready VM of a damaged snapshot is of no use")
			aside, err := filepath.Glob(filepath.Join(f.templates, "*.damaged"))
			require.NoError(t, err)
			assert.Len(t, aside, 1)
			assert.Equal(t, "hit", f.serves())
			f.awaitRest(1)
			f.awaitCensus(before)
		})
	}
}

// overwrite changes some bytes of a file.
func overwrite(t *testing.T, path string, at int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	require.NoError(t, err)
	defer f.Close()
	_, err = f.WriteAt([]byte("something else"), at)
	require.NoError(t, err)
}

// replace changes words of a file.
func replace(t *testing.T, path, from, to string) {
	t.Helper()
	data, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Contains(t, string(data), from)
	require.NoError(t, os.WriteFile(path, []byte(strings.Replace(string(data), from, to, 1)), 0o600))
}

// TestTemplatesDiskFull gives templates a small file system: too small to begin, and
// then one that fills up while a template is being written.
func TestTemplatesDiskFull(t *testing.T) {
	requireCloudHV(t)
	dir := t.TempDir()
	mount := func(flags uintptr, size string) {
		require.NoError(t, unix.Mount("templates", dir, "tmpfs", flags, "size="+size))
	}
	mount(0, "100m")
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	// A VMM that opens its files by their paths has to get there.
	require.NoError(t, os.Chmod(filepath.Dir(dir), 0o711)) //nolint:gosec
	f := newFaultNode(t, nil, map[string]any{"min": 1, "max": 1, "template_dir": dir})
	f.image()
	failures := func() float64 { return f.metric("pool_failures_total", "snapshot") }
	f.await("nothing fails", func() bool { return failures() > 0 })
	f.requireLog("MiB are free beside " + dir)
	assert.Equal(t, "cold", f.serves())

	mount(unix.MS_REMOUNT, "240m")
	f.awaitMaking()
	before, filler := failures(), filepath.Join(dir, "filler")
	require.NoError(t, fill(filler))
	f.await("the full disk is no failure", func() bool { return failures() > before })
	assert.Equal(t, "cold", f.serves())
	f.requireLog("No space left on device")

	require.NoError(t, os.Remove(filler))
	f.awaitRest(1)
	assert.Equal(t, "hit", f.serves())
	f.awaitRest(1)
	assert.Len(t, f.vms(func(poolVM) bool { return true }), 1)
	making, err := filepath.Glob(filepath.Join(dir, ".making-*"))
	require.NoError(t, err)
	assert.Empty(t, making)
}

// fill writes until there is no room.
func fill(path string) error {
	f, err := os.Create(path) //nolint:forbidigo // a test's own file
	if err != nil {
		return err
	}
	defer f.Close()
	for data := make([]byte, 64<<10); ; {
		if _, err := f.Write(data); err != nil {
			if errors.Is(err, unix.ENOSPC) {
				return nil
			}
			return err
		}
	}
}

// brokenVMM is the hypervisor under test, which restores nothing as long as a file is
// there, as an option of the plugin's.
func brokenVMM(t *testing.T) (option, binary, flag string) {
	t.Helper()
	option, program := "qemu_binary", "qemu-system-x86_64"
	if suite.vmm == "cloudhypervisor" {
		option, program = "cloud_hypervisor_binary", cmp.Or(os.Getenv("CLOUD_HYPERVISOR"), "cloud-hypervisor")
	}
	program, err := exec.LookPath(program)
	require.NoError(t, err)
	dir := t.TempDir()
	binary, flag = filepath.Join(dir, "vmm"), filepath.Join(dir, "broken")
	script := fmt.Sprintf("#!/bin/sh\nfor a; do\n\tcase $a in\n\t-incoming | --restore)\n"+
		"\t\t[ ! -e '%s' ] || { echo 'no restore today' >&2; exit 1; } ;;\n\tesac\ndone\nexec '%s' \"$@\"\n", flag, program)
	require.NoError(t, os.WriteFile(binary, []byte(script), 0o755))
	return option, binary, flag
}

// TestPoolFaults lets ready VMs fall silent, a crowd come to a pool that is empty, and
// restores fail, one after the other on one node.
func TestPoolFaults(t *testing.T) {
	requireCloudHV(t)
	option, binary, broken := brokenVMM(t)
	// A confined VMM runs no script.
	f := newFaultNode(t, map[string]any{option: binary, "confinement": map[string]any{"enabled": false}}, map[string]any{"min": 1, "max": 1})
	f.image()
	f.awaitRest(1)
	assert.Equal(t, "hit", f.serves())
	f.awaitRest(1)
	before := f.census()
	bad := func() float64 { return f.metric("pool_bad_total") }

	t.Run("ready VMM is stopped", func(t *testing.T) {
		vm, n := f.ready(), bad()
		require.NoError(t, unix.Kill(vm.VM.Pid, unix.SIGSTOP))
		assert.Equal(t, "miss", f.serves())
		f.await("it is not counted", func() bool { return bad() == n+1 })
		f.awaitRest(1)
		require.ErrorIs(t, unix.Kill(vm.VM.Pid, 0), unix.ESRCH)
		f.requireLog("a ready VM cannot be used; it is ended")
		f.awaitCensus(before)
	})
	t.Run("ready guest is silent", func(t *testing.T) {
		vm, n := f.ready(), bad()
		quiet := f.silence(vm)
		assert.Equal(t, "miss", f.serves())
		quiet()
		f.await("it is not counted", func() bool { return bad() == n+1 })
		f.awaitRest(1)
		f.awaitCensus(before)
	})
	t.Run("ready VMM dies", func(t *testing.T) {
		vm := f.ready()
		require.NoError(t, testnode.Kill9(testContext(t), vm.VM.Pid))
		f.serves()
		f.awaitRest(1)
		f.awaitCensus(before)
	})
	t.Run("crowd", func(t *testing.T) {
		f.crowd()
		f.awaitRest(1)
		f.awaitCensus(before)
	})
	t.Run("restores fail", func(t *testing.T) {
		require.NoError(t, os.WriteFile(broken, nil, 0o600))
		f.serves() // the ready one, if it was not taken
		f.await("the snapshot is not blamed", func() bool {
			f.serves()
			return f.metric("pool_snapshot_usable") == 0
		})
		assert.Equal(t, "cold", f.serves())
		f.requireLog("VMs cannot be restored from a snapshot; it is made anew")
		f.await("it does not back off", func() bool { return f.metric("pool_consecutive_failures") >= 2 && f.metric("pool_pause_seconds") > 1 })
		f.requireLog("no restore today")
		require.NoError(t, os.Remove(broken))
		f.awaitRest(1)
		assert.Equal(t, "hit", f.serves())
		f.awaitRest(1)
		f.awaitCensus(before)
	})
}

// silence stops a ready VM's guest again whenever somebody makes it go on, until the
// function that it returns is called. Its VMM answers.
func (f *faultNode) silence(vm poolVM) (quiet func()) {
	give, done := orders(f.t, f.Node, vm.VM.Dir)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		defer done()
		for ctx.Err() == nil {
			// It is in vain while it stands still, and when it has gone.
			_ = give(stop)
			time.Sleep(time.Millisecond)
		}
	})
	return func() {
		cancel()
		wg.Wait()
	}
}

// crowd lets pods come all at once to a pool that has one VM. Those that have time are
// served, and those that have none fail with the cause.
func (f *faultNode) crowd() {
	t, began := f.t, time.Now()
	var mu sync.Mutex
	var wg sync.WaitGroup
	var ids []string
	outcomes := map[bool]int{}
	for i := range count.crowd {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), testnode.Scale(3*time.Minute))
			defer cancel()
			hurried := i%2 == 1
			if hurried {
				ctx, cancel = context.WithTimeout(ctx, 500*time.Millisecond)
				defer cancel()
			}
			cfg := f.PodConfig("crowd")
			id, err := f.RunPod(ctx, cfg, testnode.CloudHV)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				ids = append(ids, id)
				outcomes[hurried]++
			case hurried:
				assert.ErrorContains(t, err, "DeadlineExceeded")
			default:
				assert.NoError(t, err)
			}
			assert.NoError(t, os.RemoveAll(cfg.GetLogDirectory()))
		})
	}
	wg.Wait()
	t.Logf("%d of %d pods with time and %d of as many without were served within %s", outcomes[false], count.crowd/2, outcomes[true],
		time.Since(began).Round(time.Millisecond))
	assert.Equal(t, count.crowd/2, outcomes[false])
	for _, id := range ids {
		ctx := testContext(t)
		assert.NoError(t, errors.Join(f.StopPod(ctx, id), f.RemovePod(ctx, id)))
	}
	// CRI keeps those that failed.
	require.NoError(t, f.RemoveAllPods(testContext(t)))
}
