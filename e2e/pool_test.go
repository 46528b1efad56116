// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// poolNode is a node of the test's own, with a pool.
func poolNode(t *testing.T, pool map[string]any, change ...func(*testnode.Options)) *testnode.Node {
	t.Helper()
	return ownNode(t, map[string]any{"pool": pool}, change...)
}

// ownNode is a node of the test's own, whose plugin is configured as said.
func ownNode(t *testing.T, cfg map[string]any, change ...func(*testnode.Options)) *testnode.Node {
	t.Helper()
	requireCloudHV(t)
	opts := nodeOptions(node(t).Name() + "pool")
	opts.CloudHV = cfg
	for _, c := range change {
		c(&opts)
	}
	n, err := testnode.New(opts)
	require.NoError(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), testnode.Scale(time.Minute))
		defer cancel()
		require.NoError(t, n.Close(ctx))
	})
	require.NoError(t, n.Start(testContext(t)), n.LogTail(4000))
	return n
}

// podOn runs a pod of ours on a node, and removes it when the test ends.
func podOn(t *testing.T, n *testnode.Node) *pod {
	t.Helper()
	return podBy(t, n, testnode.CloudHV)
}

// podBy is podOn by any handler.
func podBy(t *testing.T, n *testnode.Node, h string, change ...func(*runtimeapi.PodSandboxConfig)) *pod {
	t.Helper()
	p := &pod{t: t, n: n, handler: h, cfg: n.PodConfig("pool")}
	for _, c := range change {
		c(p.cfg)
	}
	id, err := n.RunPod(testContext(t), p.cfg, h)
	require.NoError(t, err, n.LogTail(4000))
	p.id = id
	t.Cleanup(p.remove)
	return p
}

// awaitOutcome runs pods until one comes by its VM as said.
func awaitOutcome(t *testing.T, n *testnode.Node, want string) *pod {
	t.Helper()
	for end := time.Now().Add(testnode.Scale(2 * time.Minute)); ; {
		p := podOn(t, n)
		got := p.info().Outcome
		if got == want {
			return p
		}
		p.remove()
		require.True(t, time.Now().Before(end), "pods are %s, and never %s: %s", got, want, n.LogTail(4000))
	}
}

// kernelParams runs a pod with kernel parameters of its own on a node whose pool has
// a VM ready: it boots, the pool is not asked, and keeps what it has.
func kernelParams(t *testing.T, n *testnode.Node, address string) {
	t.Helper()
	before := scrape(t, address)
	cfg := n.PodConfig("params")
	cfg.Annotations = map[string]string{"io.cloudhv.kernel_params": "cloudhv.test=yes loglevel=3"}
	id, err := n.RunPod(testContext(t), cfg, testnode.CloudHV)
	require.NoError(t, err, n.LogTail(4000))
	p := &pod{t: t, n: n, handler: testnode.CloudHV, cfg: cfg, id: id}
	t.Cleanup(p.remove)
	require.Equal(t, "cold", p.info().Outcome)
	line := p.idle("box").sh("cat /proc/cmdline")
	assert.Contains(t, line, " cloudhv.test=yes loglevel=3\n")
	after := scrape(t, address)
	assert.EqualValues(t, 1, sample(t, after, "sandbox_starts_total", "cold", "ok")-sample(t, before, "sandbox_starts_total", "cold", "ok"))
	for _, outcome := range []string{"hit", "miss", "cold", "failed"} {
		assert.Equal(t, sample(t, before, "pool_acquire_total", outcome), sample(t, after, "pool_acquire_total", outcome), outcome)
	}
}

// TestPool takes VMs that were ready, restored and booted: all serve the same pod.
func TestPool(t *testing.T) {
	for _, c := range []struct {
		outcome string
		pool    map[string]any
	}{
		{"hit", map[string]any{"min": 1, "max": 2}},
		{"miss", map[string]any{"min": 0, "max": 0}},
		{"cold", map[string]any{"restore": false}},
	} {
		t.Run(c.outcome, func(t *testing.T) {
			address := freeAddress(t)
			n := poolNode(t, c.pool, func(o *testnode.Options) { o.Metrics = address })
			img, err := testimage.Helper(suite.helper)
			require.NoError(t, err)
			require.NoError(t, n.Import(testContext(t), testimage.HelperRef, img))
			p := awaitOutcome(t, n, c.outcome)
			box := p.idle("box")
			assert.NotEmpty(t, box.sh("cat /proc/sys/kernel/random/boot_id"))
			for _, ph := range p.info().Phases {
				t.Logf("%-16s %6.1f ms", ph.Name, float64(ph.TookUsec)/1000)
			}
			if c.outcome == "hit" {
				kernelParams(t, n, address)
			}
			assert.Equal(t, "ok\n", box.sh("dd if=/dev/zero of=/big bs=1M count=20 2>/dev/null && echo ok"))
		})
	}
}
