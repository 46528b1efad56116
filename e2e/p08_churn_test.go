// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// TestChurn is point 8: nothing fails, and nothing is left of it.
func TestChurn(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		n := node(t)
		before, err := settled(testContext(t), n)
		require.NoError(t, err)
		for round := range count.churnRounds {
			start := time.Now()
			errs := make(chan error, count.churnPods)
			for i := range count.churnPods {
				go func() { errs <- churn(testContext(t), n, h, i) }()
			}
			for range count.churnPods {
				if err := <-errs; err != nil {
					t.Errorf("round %d: %v", round, err)
				}
			}
			t.Logf("round %d: %d pods in %s", round, count.churnPods, time.Since(start).Round(time.Millisecond))
		}
		if err := n.AwaitCensus(testContext(t), before); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("the end of containerd's log:\n%s", n.LogTail(6000))
		}
	})
}

// churn is a pod's whole life; how it ends differs from pod to pod.
func churn(ctx context.Context, n *testnode.Node, h string, i int) (retErr error) {
	pod := n.PodConfig(fmt.Sprint("churn", i))
	defer func() { retErr = errors.Join(retErr, os.RemoveAll(pod.GetLogDirectory())) }()
	id, err := n.RunPod(ctx, pod, h)
	if err != nil {
		return err
	}
	defer func() {
		if i%3 != 0 {
			retErr = errors.Join(retErr, n.StopPod(ctx, id))
		}
		retErr = errors.Join(retErr, n.RemovePod(ctx, id))
	}()
	c, err := n.CreateContainer(ctx, id, pod, idleConfig("c"))
	if err != nil || i%5 == 4 {
		return err
	}
	if err := n.StartContainer(ctx, c); err != nil {
		return err
	}
	want := fmt.Sprint("hello from ", i, "\n")
	if out, errOut, code, err := n.ExecSync(ctx, c, "echo", "hello", "from", fmt.Sprint(i)); err != nil || code != 0 || out != want {
		return errors.Join(fmt.Errorf("exec answers %q, %q, %d", out, errOut, code), err)
	}
	if i%2 == 0 {
		return errors.Join(n.StopContainer(ctx, c, 10*time.Second), n.RemoveContainer(ctx, c))
	}
	return nil
}
