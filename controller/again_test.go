// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

// awaitForgotten waits until nobody knows the sandbox any more.
func (n *node) awaitForgotten(id string) {
	n.t.Helper()
	require.Eventually(n.t, func() bool {
		_, err := n.get(id)
		return errdefs.IsNotFound(err)
	}, 10*time.Second, 10*time.Millisecond)
}

// TestAFailedStartIsUndoneAtLast lets the undoing of a start fail: CRI asks for nothing more,
// so nobody else would end the sandbox.
func TestAFailedStartIsUndoneAtLast(t *testing.T) {
	n := newNode(t)
	n.driver.vm.resize = errInjected
	n.net.disconnectErr = 1
	require.NoError(t, n.create("a"))
	_, err := n.Start(n.ctx(), "a")
	require.ErrorIs(t, err, errInjected)
	require.Len(t, n.all(), 1, "something is left of it")
	n.awaitForgotten("a")
	n.requireNothing()
}

// TestAnOrphanIsRemovedAtLast lets the end of a sandbox fail that containerd does not know:
// nobody asks for it.
func TestAnOrphanIsRemovedAtLast(t *testing.T) {
	n := newNode(t)
	n.run("a")
	n.net.disconnectErr = 1
	n.sandboxes.known = map[string]bool{}
	n.restart()
	n.awaitForgotten("a")
	n.requireNothing()
}

// TestNothingIsTriedAgainAfterClose closes the controller while something is left: the next
// containerd finds it.
func TestNothingIsTriedAgainAfterClose(t *testing.T) {
	n := newNode(t)
	n.run("a")
	n.net.disconnectErr = 2
	n.sandboxes.known = map[string]bool{}
	n.restart()
	require.Len(t, n.all(), 1)
	require.NoError(t, n.Close())
	time.Sleep(2 * firstAgain)
	require.Len(t, n.all(), 1)
	require.Equal(t, 1, n.net.disconnectErr)
	n.restart()
	n.awaitForgotten("a")
	n.requireNothing()
}
