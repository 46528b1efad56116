// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// moment is one of a container's start, told by what the start leaves on its way.
// Its check fails before.
type moment struct {
	name  string
	check func(c *container) error
}

var moments = []moment{
	{"at once", func(*container) error { return nil }},
	{"when its streams are made", func(c *container) error {
		_, err := os.Stat(c.log)
		return err
	}},
	{"when it runs", func(c *container) error {
		lines, err := readLog(c.log)
		if err == nil && len(lines) == 0 {
			err = os.ErrNotExist
		}
		return err
	}},
}

// duringStart makes a call while a container starts, and returns what became of
// both.
func duringStart(c *container, m moment, call func(ctx context.Context) error) (start, other error) {
	c.t.Helper()
	limit := testContext(c.t)
	ctx, ended := context.WithCancel(limit)
	defer ended()
	started := make(chan error, 1)
	go func() {
		started <- c.n.StartContainer(limit, c.id)
		ended()
	}()
	// A start that ends before its moment comes is over, and the call is no less right.
	_ = testnode.Eventually(ctx, func(context.Context) error { return m.check(c) })
	other = call(limit)
	return <-started, other
}

// Classes of errors that CRI itself has, for calls that meet above all. The last
// three are what a container's start gives when its pod goes: ours says so, where
// runc only knows that some file is not there.
const (
	ok           = "OK"
	notStartable = "Unknown: failed to set starting state for container …"
	notRemovable = "Unknown: failed to set removing state for container …"
	notEmptied   = "Unknown: failed to remove container …"
	notRunning   = "Unknown: sandbox container … is not running"
	notCreated   = "Unknown: failed to create containerd task"
	notStarted   = "Unknown: failed to start containerd task …"
	notExecuted  = "Unknown: failed to exec in container"
	noNetwork    = "Unknown: failed to setup network for sandbox …"
	networkGone  = "Unknown: failed to destroy network for sandbox …"
	podGone      = "Unavailable: failed to create containerd task"
	podGoneLater = "Unavailable: failed to start containerd task …"
)

// TestOrderDuringStart is the hard part of point 9: a container's start meets its
// own end, or its pod's.
func TestOrderDuringStart(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		n := node(t)
		before, err := settled(testContext(t), n)
		require.NoError(t, err)
		t.Run("container", func(t *testing.T) {
			p := newPod(t, h)
			for _, m := range moments {
				c := p.create(idleConfig("stopped " + m.name))
				start, stop := duringStart(c, m, func(ctx context.Context) error { return n.StopContainer(ctx, c.id, time.Second) })
				require.NoError(t, start, m.name)
				require.NoError(t, stop, m.name)
				c = p.create(idleConfig("removed " + m.name))
				start, remove := duringStart(c, m, func(ctx context.Context) error { return n.RemoveContainer(ctx, c.id) })
				require.Contains(t, []string{ok, notStartable}, class(start), "%s: %v", m.name, start)
				require.Contains(t, []string{ok, notRemovable}, class(remove), "%s: %v", m.name, remove)
				require.NoError(t, n.RemoveContainer(testContext(t), c.id), m.name)
			}
			p.idle("after").exec("true")
		})
		pods := map[string]func(ctx context.Context, id string) error{"stop": n.StopPod, "remove": n.RemovePod}
		for name, call := range pods {
			t.Run(name+" the pod", func(t *testing.T) {
				for _, m := range moments {
					p := newPod(t, h)
					start, end := duringStart(p.create(idleConfig("c")), m, func(ctx context.Context) error { return call(ctx, p.id) })
					require.Contains(t, []string{ok, notRunning, notCreated, notStarted, podGone, podGoneLater}, class(start), "%s: %v", m.name, start)
					require.Contains(t, []string{ok, notEmptied}, class(end), "%s: %v", m.name, end)
					require.NoError(t, n.StopPod(testContext(t), p.id), m.name)
					require.NoError(t, n.RemovePod(testContext(t), p.id), m.name)
				}
			})
		}
		require.NoError(t, n.AwaitCensus(testContext(t), before))
	})
}

// TestOrderDuringCreation stops and removes a pod while a container of it is made.
func TestOrderDuringCreation(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		ctx := testContext(t)
		started := make(chan error, 1)
		go func() {
			id, err := p.n.CreateContainer(ctx, p.id, p.cfg, idleConfig("c"))
			if err == nil {
				err = p.n.StartContainer(ctx, id)
			}
			started <- err
		}()
		require.NoError(t, p.n.StopPod(ctx, p.id))
		err := <-started
		require.Contains(t, []string{ok, notRunning, notCreated, notStarted, podGone, podGoneLater}, class(err), "%v", err)
		require.NoError(t, p.n.StopPod(ctx, p.id))
		require.NoError(t, p.n.RemovePod(ctx, p.id))
	})
}
