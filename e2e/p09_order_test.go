// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// TestOrder is point 9: calls that come too early, twice, or in another order.
func TestOrder(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		t.Run("stop and remove before start", func(t *testing.T) {
			p := newPod(t, h)
			stopped, removed, left := p.create(idleConfig("stopped")), p.create(idleConfig("removed")), p.create(idleConfig("left"))
			ctx := testContext(t)
			require.NoError(t, p.n.StopContainer(ctx, stopped.id, time.Second))
			require.NoError(t, p.n.StopContainer(ctx, stopped.id, time.Second))
			require.NoError(t, p.n.RemoveContainer(ctx, stopped.id))
			require.NoError(t, p.n.RemoveContainer(ctx, removed.id))
			require.NoError(t, p.n.RemoveContainer(ctx, removed.id))
			require.Equal(t, runtimeapi.ContainerState_CONTAINER_CREATED, left.status().GetState())
		})
		t.Run("twice", func(t *testing.T) {
			p := newPod(t, h)
			c := p.idle("c")
			ctx := testContext(t)
			require.Equal(t, notStartable, class(p.n.StartContainer(ctx, c.id)), "it runs")
			for range 2 {
				require.NoError(t, p.n.StopContainer(ctx, c.id, 10*time.Second))
			}
			require.Equal(t, notStartable, class(p.n.StartContainer(ctx, c.id)), "it has ended")
			for range 2 {
				require.NoError(t, p.n.StopPod(ctx, p.id))
			}
			for range 2 {
				require.NoError(t, p.n.RemoveContainer(ctx, c.id))
			}
			for range 2 {
				require.NoError(t, p.n.RemovePod(ctx, p.id))
			}
			require.NoError(t, p.n.StopPod(ctx, p.id), "one that does not exist")
		})
		t.Run("in parallel", func(t *testing.T) {
			p := newPod(t, h)
			c := p.idle("c")
			ctx := testContext(t)
			for _, err := range together(4, func() error { return p.n.StopContainer(ctx, c.id, 10*time.Second) }) {
				require.NoError(t, err)
			}
			// The CNI plugin may find that another has just removed what it is to remove.
			for _, err := range together(4, func() error { return p.n.StopPod(ctx, p.id) }) {
				require.Contains(t, []string{ok, networkGone}, class(err), "%v", err)
			}
			require.NoError(t, p.n.StopPod(ctx, p.id))
		})
		t.Run("remove what runs", func(t *testing.T) {
			p := newPod(t, h)
			c := p.idle("c")
			require.NoError(t, p.n.RemoveContainer(testContext(t), c.id))
			p.idle("d")
			require.NoError(t, p.n.RemovePod(testContext(t), p.id))
		})
		t.Run("in a stopped pod", func(t *testing.T) {
			p := newPod(t, h)
			c := p.create(idleConfig("c"))
			require.NoError(t, p.n.StopPod(testContext(t), p.id))
			require.Equal(t, notRunning, class(p.n.StartContainer(testContext(t), c.id)))
			_, err := p.n.CreateContainer(testContext(t), p.id, p.cfg, idleConfig("d"))
			require.Equal(t, notRunning, class(err), "%v", err)
		})
	})
}

// together calls f n times at once and returns what came of it.
func together(n int, f func() error) []error {
	errs := make(chan error, n)
	for range n {
		go func() { errs <- f() }()
	}
	var all []error
	for range n {
		all = append(all, <-errs)
	}
	return all
}

// TestOrderMachineGone is point 9 for a pod whose virtual machine is gone.
func TestOrderMachineGone(t *testing.T) {
	requireCloudHV(t)
	for name, calls := range map[string]func(ctx context.Context, p *pod, c *container) error{
		"stop and remove": func(ctx context.Context, p *pod, _ *container) error {
			return errors.Join(p.n.StopPod(ctx, p.id), p.n.StopPod(ctx, p.id), p.n.RemovePod(ctx, p.id), p.n.RemovePod(ctx, p.id))
		},
		"remove": func(ctx context.Context, p *pod, _ *container) error { return p.n.RemovePod(ctx, p.id) },
		"container first": func(ctx context.Context, p *pod, c *container) error {
			// CRI may stop a container before it has been told that the container ended; then it
			// refuses to remove it, and kubelet asks again.
			return errors.Join(p.n.StopContainer(ctx, c.id, time.Second),
				testnode.Eventually(ctx, func(ctx context.Context) error { return p.n.RemoveContainer(ctx, c.id) }),
				p.n.RemovePod(ctx, p.id))
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPod(t, testnode.CloudHV)
			c := p.idle("c")
			p.create(idleConfig("created"))
			require.NoError(t, testnode.Kill9(testContext(t), p.info().VMMPid))
			require.NoError(t, calls(testContext(t), p, c))
		})
	}
}

// TestOrderCancelledStart is point 9 for a pod's own start: whoever asked goes
// away at some moment of it. Nothing may be left but what CRI lists. There is no
// peer: a runc that is killed while it makes a container leaves its cgroup behind.
func TestOrderCancelledStart(t *testing.T) {
	requireCloudHV(t)
	n := node(t)
	before, err := settled(testContext(t), n)
	require.NoError(t, err)
	for _, delay := range []time.Duration{20, 60, 120, 300, 600, 1000} {
		cfg := podConfig(t)
		ctx, cancel := context.WithTimeout(testContext(t), delay*time.Millisecond)
		id, err := n.RunPod(ctx, cfg, testnode.CloudHV)
		cancel()
		if err == nil {
			require.NoError(t, n.RemovePod(testContext(t), id))
			continue
		}
		// A CNI plugin that is killed does not tell why it has ended.
		if class(err) != noNetwork {
			require.Contains(t, []codes.Code{codes.DeadlineExceeded, codes.Canceled}, status.Code(errors.Unwrap(err)), "%v", err)
		}
	}
	require.NoError(t, testnode.Eventually(testContext(t), func(ctx context.Context) error {
		if err := n.RemoveAllPods(ctx); err != nil {
			return err
		}
		short, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		return n.AwaitCensus(short, before)
	}))
}

// TestOrderDuplicate runs one pod twice: the second is refused and harms nothing.
func TestOrderDuplicate(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		c := p.idle("c")
		_, err := p.n.RunPod(testContext(t), p.cfg, h)
		require.ErrorContains(t, err, "is reserved")
		_, err = p.n.CreateContainer(testContext(t), p.id, p.cfg, idleConfig("c"))
		require.ErrorContains(t, err, "is reserved")
		c.exec("true")
	})
}
