// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// ctlStatus and ctlVM are the part of cloudhvctl's JSON that the tests read.
type ctlStatus struct {
	Fit        bool     `json:"fit"`
	Reasons    []string `json:"reasons"`
	Hypervisor struct {
		Name, Version, Accelerator string
	} `json:"hypervisor"`
	Pool struct {
		On, Drained, Usable                                              bool
		Ready, Making, Target, Max, Hits, Misses, Cold, Failures, Failed float64
	} `json:"pool"`
	Snapshots []struct {
		ID      string
		Bytes   float64
		Users   int
		Current bool
	} `json:"snapshots"`
	VMs map[string]float64 `json:"vms"`
}

type ctlVM struct {
	ID  string `json:"id"`
	Pod *struct {
		ID, Namespace, Name string
	} `json:"pod"`
	State       string  `json:"state"`
	Outcome     string  `json:"outcome"`
	VCPUs       int     `json:"vcpus"`
	MemoryBytes int64   `json:"memory_bytes"`
	VMMPid      int     `json:"vmm_pid"`
	ShimPid     int     `json:"shim_pid"`
	VMMPSS      float64 `json:"vmm_pss_bytes"`
	ShimPSS     float64 `json:"shim_pss_bytes"`
	Snapshot    string  `json:"snapshot"`
	Phases      []struct {
		Name string
		Took float64 `json:"took_seconds"`
	} `json:"phases"`
}

// ctl runs cloudhvctl, which must succeed, and returns what it printed.
func ctl(t *testing.T, n *testnode.Node, args ...string) string {
	t.Helper()
	out, errOut, err := n.Ctl(testContext(t), args...)
	require.NoError(t, err, "cloudhvctl %q: %s", args, errOut)
	assert.Empty(t, errOut)
	return out
}

// ctlJSON runs cloudhvctl and reads its JSON.
func ctlJSON[T any](t *testing.T, n *testnode.Node, args ...string) (v T) {
	t.Helper()
	out := ctl(t, n, append([]string{"-o", "json"}, args...)...)
	require.NoError(t, json.Unmarshal([]byte(out), &v), out)
	return v
}

// ctlFails runs cloudhvctl, which must exit with a status, and returns its error.
func ctlFails(t *testing.T, n *testnode.Node, code int, args ...string) string {
	t.Helper()
	_, errOut, err := n.Ctl(testContext(t), args...)
	var exit *exec.ExitError
	require.True(t, errors.As(err, &exit), "cloudhvctl %q: %v", args, err)
	require.Equal(t, code, exit.ExitCode(), errOut)
	return errOut
}

// TestCtl looks at a node and tends its pool by cloudhvctl.
func TestCtl(t *testing.T) {
	address := freeAddress(t)
	n := poolNode(t, map[string]any{"min": 1, "max": 3}, func(o *testnode.Options) { o.Metrics = address })
	img, err := testimage.Helper(suite.helper)
	require.NoError(t, err)
	require.NoError(t, n.Import(testContext(t), testimage.HelperRef, img))

	assert.Regexp(t, `^filled: [12] ready\n$`, ctl(t, n, "fill"))
	t.Log("\n" + ctl(t, n, "status"))
	p := podOn(t, n)
	assert.Equal(t, "hit", p.info().Outcome)
	p.idle("box")
	ctl(t, n, "fill")
	t.Run("vms", func(t *testing.T) { ctlListsPods(t, n, p) })
	t.Run("status", func(t *testing.T) { ctlAgreesWithMetrics(t, n, address) })
	t.Run("console", func(t *testing.T) { ctlShowsConsoles(t, n, p) })
	t.Run("drain and fill", func(t *testing.T) { ctlDrainsAndFills(t, n) })
	t.Run("rebuild", func(t *testing.T) { ctlRebuilds(t, n, p) })
	t.Run("restart", func(t *testing.T) {
		ctl(t, n, "drain")
		require.NoError(t, n.Restart(testContext(t), false))
		assert.False(t, ctlJSON[ctlStatus](t, n, "status").Pool.Drained)
		ctl(t, n, "fill")
		assert.Equal(t, p.id, ctlJSON[[]ctlVM](t, n, "vms")[0].Pod.ID)
	})
}

// ctlListsPods: the pod and the pool's VMs are listed, with what they cost.
func ctlListsPods(t *testing.T, n *testnode.Node, p *pod) {
	t.Log("\n" + ctl(t, n, "vms", "--phases"))
	list := ctlJSON[[]ctlVM](t, n, "vms")
	vm, info := list[0], p.info()
	require.NotNil(t, vm.Pod)
	assert.Equal(t, p.id, vm.Pod.ID)
	assert.Equal(t, p.cfg.GetMetadata().GetNamespace(), vm.Pod.Namespace)
	assert.Equal(t, p.cfg.GetMetadata().GetName(), vm.Pod.Name)
	assert.Equal(t, "ready", vm.State)
	assert.Equal(t, "hit", vm.Outcome)
	assert.Equal(t, info.VMMPid, vm.VMMPid)
	assert.Equal(t, info.ShimPid, vm.ShimPid)
	assert.Equal(t, info.MemoryBytes, vm.MemoryBytes)
	assert.Equal(t, info.VCPUs, vm.VCPUs)
	assert.Len(t, vm.Phases, len(info.Phases))
	assert.Greater(t, vm.VMMPSS, float64(10<<20))
	assert.Greater(t, vm.ShimPSS, float64(1<<20))
	pooled := slices.DeleteFunc(list, func(vm ctlVM) bool { return vm.State != "pooled" })
	require.NotEmpty(t, pooled)
	assert.Nil(t, pooled[0].Pod)
	assert.Greater(t, pooled[0].VMMPSS, float64(10<<20))
}

// ctlAgreesWithMetrics compares the status with a scrape.
func ctlAgreesWithMetrics(t *testing.T, n *testnode.Node, address string) {
	s := ctlJSON[ctlStatus](t, n, "status")
	f := scrape(t, address)
	assert.True(t, s.Fit)
	assert.Empty(t, s.Reasons)
	assert.Equal(t, suite.vmm, s.Hypervisor.Name)
	assert.True(t, s.Pool.On && s.Pool.Usable && !s.Pool.Drained)
	for _, c := range []struct {
		got    float64
		metric []string
	}{
		{s.Pool.Ready, []string{"pool_depth"}}, {s.Pool.Target, []string{"pool_target"}}, {s.Pool.Max, []string{"pool_max"}},
		{s.Pool.Failures, []string{"pool_consecutive_failures"}},
		{s.Pool.Hits, []string{"pool_acquire_total", "hit"}}, {s.Pool.Misses, []string{"pool_acquire_total", "miss"}},
		{s.Pool.Cold, []string{"pool_acquire_total", "cold"}}, {s.Pool.Failed, []string{"pool_acquire_total", "failed"}},
		{s.VMs["pooled"], []string{"vms", "ready"}}, {s.VMs["ready"], []string{"vms", "sandbox"}},
		{s.Snapshots[0].Bytes, []string{"snapshot_bytes", "current"}},
	} {
		assert.InDelta(t, sample(t, f, c.metric[0], c.metric[1:]...), c.got, 0, "%v", c.metric)
	}
	assert.InDelta(t, 1, s.Pool.Hits, 0)
	require.Len(t, s.Snapshots, 1)
	assert.True(t, s.Snapshots[0].Current)
	assert.Equal(t, int(s.Pool.Ready)+1, s.Snapshots[0].Users)
}

// ctlShowsConsoles: a console is found by each of its names, and a name finds
// nothing else.
func ctlShowsConsoles(t *testing.T, n *testnode.Node, p *pod) {
	vm := ctlJSON[[]ctlVM](t, n, "vms")[0]
	whole := ctl(t, n, "console", p.id)
	assert.NotEmpty(t, whole)
	for _, r := range whole {
		assert.True(t, r == '\n' || r == '\t' || r >= ' ' && r != 0x7f, "%q", r)
	}
	assert.Equal(t, whole, ctl(t, n, "console", p.id[:13]))
	assert.Equal(t, whole, ctl(t, n, "console", vm.ID))
	assert.True(t, strings.HasSuffix(whole, ctl(t, n, "console", "--tail", "20", vm.ID)))
	got := ctlJSON[struct{ VM, Pod, Console string }](t, n, "console", vm.ID)
	assert.Equal(t, vm.ID, got.VM)
	assert.Equal(t, p.id, got.Pod)
	assert.Equal(t, whole, got.Console)
	for _, bad := range []string{"nobody", "../../../etc", p.id + "/../" + p.id} {
		assert.Contains(t, ctlFails(t, n, 6, "console", bad), "cloudhvctl vms")
	}
}

// ctlDrainsAndFills: pods of a drained pool are restored their VMs, and find one
// ready when it was filled.
func ctlDrainsAndFills(t *testing.T, n *testnode.Node) {
	assert.Contains(t, ctl(t, n, "drain"), "drained: ")
	s := ctlJSON[ctlStatus](t, n, "status")
	assert.True(t, s.Pool.Drained)
	assert.Zero(t, s.Pool.Ready+s.Pool.Making+s.Pool.Target+s.VMs["pooled"]+s.VMs["making"])
	miss := podOn(t, n)
	assert.Equal(t, "miss", miss.info().Outcome)
	assert.Equal(t, "ok\n", miss.idle("miss").sh("echo ok"))
	miss.remove()
	assert.Zero(t, ctlJSON[ctlStatus](t, n, "status").Pool.Ready, "it stays drained")
	assert.Contains(t, ctlFails(t, n, 2, "fill", "4"), "the pool may have 3")
	assert.Equal(t, "filled: 3 ready\n", ctl(t, n, "fill", "3"))
	hit := podOn(t, n)
	assert.Equal(t, "hit", hit.info().Outcome)
	assert.Equal(t, "ok\n", hit.idle("hit").sh("echo ok"))
	hit.remove()
}

// ctlRebuilds: the base snapshot is made anew beside a pod of the old one, which
// runs on; the next pod's VM is of the new one.
func ctlRebuilds(t *testing.T, n *testnode.Node, p *pod) {
	old := ctlJSON[[]ctlVM](t, n, "vms")[0]
	rebuilt := ctlJSON[struct{ Snapshot struct{ ID string } }](t, n, "rebuild").Snapshot.ID
	assert.Equal(t, old.Snapshot+"-1", rebuilt)
	ctx, cancel := context.WithTimeout(testContext(t), testnode.Scale(testLimit))
	defer cancel()
	require.NoError(t, testnode.Eventually(ctx, func(context.Context) error {
		for _, vm := range ctlJSON[[]ctlVM](t, n, "vms") {
			if vm.Pod == nil && (vm.State != "pooled" || vm.Snapshot != rebuilt) {
				return errors.New("the ready VMs are not replaced yet")
			}
		}
		return nil
	}))
	t.Log("\n" + ctl(t, n, "status"))
	next := podOn(t, n)
	assert.Equal(t, "hit", next.info().Outcome)
	assert.Equal(t, "ok\n", next.idle("next").sh("echo ok"))
	s := ctlJSON[ctlStatus](t, n, "status")
	require.Len(t, s.Snapshots, 2)
	assert.Equal(t, rebuilt, s.Snapshots[0].ID)
	assert.Equal(t, 1, s.Snapshots[1].Users, "the first pod's")
	for _, vm := range ctlJSON[[]ctlVM](t, n, "vms") {
		switch {
		case vm.Pod != nil && vm.Pod.ID == next.id:
			assert.Equal(t, rebuilt, vm.Snapshot)
		case vm.Pod != nil && vm.Pod.ID == p.id:
			assert.Equal(t, old.VMMPid, vm.VMMPid)
			assert.Equal(t, old.Snapshot, vm.Snapshot)
		}
	}
	late := p.idle("late")
	assert.Equal(t, "ok\n", late.sh("echo ok"), "the first pod runs on")
	next.remove()
}

// TestCtlOfAnUnfitNode tells every reason, and what else fails says where to look.
func TestCtlOfAnUnfitNode(t *testing.T) {
	n := ownNode(t, map[string]any{"kernel": "/nonexistent/kernel", "vmm": "xen"})
	out, errOut, err := n.Ctl(testContext(t), "status")
	var exit *exec.ExitError
	require.True(t, errors.As(err, &exit), errOut)
	assert.Equal(t, 5, exit.ExitCode())
	t.Log("\n" + out)
	assert.Contains(t, out, "CANNOT SERVE")
	assert.Contains(t, out, "/nonexistent/kernel")
	assert.Contains(t, out, `"xen"`)
	assert.Contains(t, errOut, "restart containerd")
	assert.Contains(t, ctlFails(t, n, 5, "drain"), "cloudhvctl status")
	assert.Empty(t, ctlJSON[[]ctlVM](t, n, "vms"))
	require.NoError(t, n.Stop(testContext(t)))
	assert.Contains(t, ctlFails(t, n, 3, "status"), "containerd")
}
