// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

// The VM comes to be after somebody has begun to end the sandbox.
func TestAnEndingWaitsForTheStartUnderWay(t *testing.T) {
	n := newNode(t)
	n.driver.bootGate = make(chan struct{})
	require.NoError(t, n.create("a"))
	p, err := n.get("a")
	require.NoError(t, err)
	result := make(chan error, 1)
	go func() {
		_, err := n.Start(n.ctx(), "a")
		result <- err
	}()
	require.Eventually(t, func() bool {
		n.driver.mu.Lock()
		defer n.driver.mu.Unlock()
		return n.driver.boots == 1
	}, 5*time.Second, time.Millisecond)
	e := n.Controller.end(n.ctx(), p, endReason{cause: "stopped", label: "stop", graceful: true})
	select {
	case <-e.done:
		t.Error("ended while the VM is about to come")
	case <-time.After(50 * time.Millisecond):
	}
	close(n.driver.bootGate)
	<-e.done
	require.NoError(t, e.err)
	require.ErrorIs(t, <-result, errdefs.ErrAborted)
	n.requireNothing()
}

func TestNoStartOnceAnEndingHasBegun(t *testing.T) {
	n := newNode(t)
	require.NoError(t, n.create("a"))
	p, err := n.get("a")
	require.NoError(t, err)
	p.mu.Lock()
	p.ending = &ending{done: make(chan struct{})}
	p.mu.Unlock()
	_, err = n.Start(n.ctx(), "a")
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.ErrorContains(t, err, "being stopped")
	require.Zero(t, n.driver.boots)
	p.mu.Lock()
	p.ending = nil
	p.mu.Unlock()
	require.NoError(t, n.Shutdown(n.ctx(), "a"))
	n.requireNothing()
}

func TestStartAndShutdownAtOnce(t *testing.T) {
	n := newNode(t)
	for i := range 40 {
		id := fmt.Sprint("pod", i)
		require.NoError(t, n.create(id))
		var wg sync.WaitGroup
		wg.Go(func() { _, _ = n.Start(n.ctx(), id) })
		wg.Go(func() {
			if err := n.Shutdown(n.ctx(), id); err != nil {
				t.Error(err)
			}
		})
		wg.Wait()
		n.requireNothing()
	}
}
