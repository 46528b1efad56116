// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

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

// podOn runs a pod on a node, and removes it when the test ends.
func podOn(t *testing.T, n *testnode.Node) *pod {
	t.Helper()
	p := &pod{t: t, n: n, handler: testnode.CloudHV, cfg: n.PodConfig("pool")}
	id, err := n.RunPod(testContext(t), p.cfg, testnode.CloudHV)
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
			n := poolNode(t, c.pool)
			img, err := testimage.Helper(suite.helper)
			require.NoError(t, err)
			require.NoError(t, n.Import(testContext(t), testimage.HelperRef, img))
			p := awaitOutcome(t, n, c.outcome)
			box := p.idle("box")
			assert.NotEmpty(t, box.sh("cat /proc/sys/kernel/random/boot_id"))
			for _, ph := range p.info().Phases {
				t.Logf("%-16s %6.1f ms", ph.Name, float64(ph.TookUsec)/1000)
			}
			assert.Equal(t, "ok\n", box.sh("dd if=/dev/zero of=/big bs=1M count=20 2>/dev/null && echo ok"))
		})
	}
}

// clones is how many VMs of one snapshot are compared.
const clones = 16

// identity is what the first process of a container drew, by source.
type identity map[string]string

// first runs a pod whose container prints what it is, and returns that, and when
// the container's process was not yet and no longer running.
func first(t *testing.T, n *testnode.Node, i int) (identity, time.Time, time.Time) {
	t.Helper()
	p := podOn(t, n)
	require.Equal(t, "miss", p.info().Outcome)
	c := p.create(helperConfig(fmt.Sprint("who", i), "who"))
	before := time.Now()
	require.NoError(t, n.StartContainer(testContext(t), c.id))
	lines := c.awaitLog(func(l []logLine) bool { return len(l) >= 8 })
	after := time.Now()
	p.remove()
	who := identity{}
	for _, l := range lines {
		name, value, _ := strings.Cut(l.text, " ")
		who[name] = value
	}
	return who, before, after
}

// TestClones compares the first things that the workloads of clones draw: none
// may be another's, from the first byte on, and the time must be right.
func TestClones(t *testing.T) {
	n := poolNode(t, map[string]any{"min": 0, "max": 0})
	img, err := testimage.Helper(suite.helper)
	require.NoError(t, err)
	require.NoError(t, n.Import(testContext(t), testimage.HelperRef, img))
	awaitOutcome(t, n, "miss").remove()
	seen := map[string]string{}
	for i := range clones {
		who, before, after := first(t, n, i)
		for _, source := range []string{"getrandom", "urandom", "crypto", "math", "maphash", "boot_id"} {
			require.NotEmpty(t, who[source], source)
			if other, ok := seen[who[source]]; ok {
				t.Errorf("clone %d drew %s from %s, as %s did", i, who[source], source, other)
			}
			seen[who[source]] = fmt.Sprint(source, " of clone ", i)
		}
		nanos, err := strconv.ParseInt(who["clock"], 10, 64)
		require.NoError(t, err)
		const off = 50 * time.Millisecond
		clock := time.Unix(0, nanos)
		assert.True(t, clock.After(before.Add(-off)) && clock.Before(after.Add(off)), "clone %d: its time is %v, and it ran from %v to %v", i, clock, before, after)
		up, err := strconv.ParseFloat(who["uptime"], 64)
		require.NoError(t, err)
		assert.True(t, up > 0 && up < 600, "clone %d is up for %v s", i, up)
	}
}
