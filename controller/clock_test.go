// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// fakeClock is a guest's clock. The zero one is right.
type fakeClock struct {
	mu  sync.Mutex
	off time.Duration
	// to and back are what the way to the guest takes, and from it.
	to, back time.Duration
	// stopped, if set, is what all calls wait for.
	stopped chan struct{}
	err     error
	asked   int
	slewed  []time.Duration
	stepped []time.Duration
}

func (c *fakeClock) set(f func(*fakeClock)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f(c)
}

// get returns how far it is off, and how often it was asked.
func (c *fakeClock) get() (time.Duration, int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.off, c.asked
}

func (s *machineService) SyncClock(_ context.Context, req *guestv1.SyncClockRequest) (*guestv1.SyncClockResponse, error) {
	c := &s.m.clock
	c.mu.Lock()
	stopped, to, back := c.stopped, c.to, c.back
	c.asked++
	c.mu.Unlock()
	if stopped != nil {
		select {
		case <-stopped:
		case <-s.m.done:
		}
	}
	time.Sleep(to)
	defer time.Sleep(back)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return nil, errgrpc.ToGRPC(c.err)
	}
	by := time.Duration(req.GetOffsetNsec())
	switch {
	case by.Abs() > 20*time.Millisecond:
		c.stepped, c.off = append(c.stepped, by), c.off+by
	case by != 0:
		c.slewed, c.off = append(c.slewed, by), c.off+by
	}
	return &guestv1.SyncClockResponse{Clock: timestamppb.New(time.Now().Add(c.off)), Stepped: by.Abs() > 20*time.Millisecond}, nil
}

// A clock is put right however far it is off, and whatever the way there takes; what
// is within the uncertainty is left alone.
func TestSyncClock(t *testing.T) {
	for _, tc := range []struct {
		off, to, back time.Duration
		want          string
		within        time.Duration
	}{
		{0, 0, 0, clockKept, clockTolerance},
		{3 * time.Second, 0, 0, clockStepped, 10 * time.Millisecond},
		{-300 * 24 * time.Hour, 5 * time.Millisecond, 5 * time.Millisecond, clockStepped, 10 * time.Millisecond},
		{15 * time.Millisecond, 0, 0, clockSlewed, 5 * time.Millisecond},
		// 60 ms one way: the error is half of that.
		{-time.Hour, 60 * time.Millisecond, 0, clockStepped, 45 * time.Millisecond},
		{0, 60 * time.Millisecond, 0, clockKept, clockTolerance},
	} {
		t.Run(fmt.Sprint(tc.off, tc.to, tc.back), func(t *testing.T) {
			n := newNode(t)
			p := n.run("a")
			clock := &n.driver.only(t).clock
			clock.set(func(c *fakeClock) { c.off, c.to, c.back = tc.off, tc.to, tc.back })
			vm, err := p.machine()
			require.NoError(t, err)
			got, err := n.syncClock(t.Context(), vm)
			require.NoError(t, err)
			assert.Equal(t, tc.want, got)
			off, _ := clock.get()
			assert.Less(t, off.Abs(), tc.within)
		})
	}
}

// keepClocks keeps the clocks of a node.
func keepClocks(t *testing.T, n *node, every time.Duration) {
	t.Helper()
	n.cfg.ClockSync = every
	n.KeepClocks()
	t.Cleanup(func() { require.NoError(t, n.Close()) })
}

func (n *node) awaitClock(what string, clock *fakeClock) {
	n.t.Helper()
	require.Eventually(n.t, func() bool { off, _ := clock.get(); return off.Abs() < 20*time.Millisecond }, 10*time.Second, time.Millisecond, what)
}

func TestClocksAreKept(t *testing.T) {
	n := newNode(t)
	n.run("a")
	clock := &n.driver.only(t).clock
	clock.set(func(c *fakeClock) { c.off = time.Minute })
	keepClocks(t, n, 50*time.Millisecond)
	n.awaitClock("at the beginning", clock)
	clock.set(func(c *fakeClock) { c.off = -time.Minute })
	n.awaitClock("again", clock)
	clock.set(func(c *fakeClock) { c.err = errInjected })
	time.Sleep(100 * time.Millisecond)
	clock.set(func(c *fakeClock) { c.err, c.off = nil, time.Hour })
	n.awaitClock("after a failure", clock)
	require.NoError(t, n.Stop(n.ctx(), "a"))
	_, asked := clock.get()
	time.Sleep(150 * time.Millisecond)
	_, after := clock.get()
	assert.LessOrEqual(t, after, asked+1, "one that has ended is not asked")
}

// Guests that do not answer hold up no other, and are put right as soon as they go on.
func TestSilentGuestsClocks(t *testing.T) {
	n := newNode(t)
	gate := make(chan struct{})
	var silent []*fakeClock
	for i := range 2 * clockParallel {
		n.run(fmt.Sprint("silent", i))
	}
	for _, m := range n.machines() {
		m.clock.set(func(c *fakeClock) { c.stopped, c.off = gate, -time.Minute })
		silent = append(silent, &m.clock)
	}
	n.run("fine")
	var fine *fakeClock
	for _, m := range n.machines() {
		if m.configured.GetPodId() == "fine" {
			fine = &m.clock
		}
	}
	fine.set(func(c *fakeClock) { c.off = time.Minute })
	keepClocks(t, n, time.Second)
	n.awaitClock("one that answers", fine)
	for _, c := range silent {
		require.Eventually(t, func() bool { _, asked := c.get(); return asked == 1 }, 10*time.Second, time.Millisecond, "each is asked")
	}
	time.Sleep(1200 * time.Millisecond)
	for _, c := range silent { // rounds have passed
		_, asked := c.get()
		assert.Equal(t, 1, asked, "and no second time before it has answered")
	}
	began := time.Now()
	close(gate)
	for _, c := range silent {
		n.awaitClock("one that goes on", c)
	}
	t.Logf("%d clocks were right %v after their guests went on", len(silent), time.Since(began))
	// Nobody waits for them at the end either.
	again := make(chan struct{})
	defer close(again)
	for _, c := range silent {
		c.set(func(c *fakeClock) { c.stopped = again })
	}
	began = time.Now()
	require.NoError(t, n.Close())
	assert.Less(t, time.Since(began), 5*time.Second)
}

func TestNoClocksAreKept(t *testing.T) {
	n := newNode(t)
	n.run("a")
	clock := &n.driver.only(t).clock
	clock.set(func(c *fakeClock) { c.off = time.Minute })
	keepClocks(t, n, 0)
	time.Sleep(50 * time.Millisecond)
	off, _ := clock.get()
	assert.Equal(t, time.Minute, off)
}

// A configuration that was long on its way is followed by another look.
func TestClockOfALateConfiguration(t *testing.T) {
	n := newNode(t)
	n.driver.agent.slowConfigure, n.driver.agent.noSteps = 2*clockLag, true
	n.run("a")
	_, asked := n.driver.only(t).clock.get()
	assert.Positive(t, asked)
	n.driver.agent.slowConfigure = 0
	require.NoError(t, n.Shutdown(n.ctx(), "a"))
	p := n.run("b")
	assert.WithinDuration(t, time.Now(), n.driver.only(t).configured.GetClock().AsTime(), time.Since(p.snapshot().CreatedAt))
}

// nudge sets the host's clock there and back, by too little for anybody to notice.
func nudge(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("root is needed")
	}
	for _, ns := range []int64{1, -1} {
		ts := unix.NsecToTimespec(ns)
		x := unix.Timex{Modes: unix.ADJ_SETOFFSET | unix.ADJ_NANO, Time: unix.Timeval{Sec: ts.Sec, Usec: ts.Nsec}}
		if _, err := unix.Adjtimex(&x); errors.Is(err, unix.EPERM) {
			t.Skip("the clock must not be set here")
		} else {
			require.NoError(t, err)
		}
	}
}

func TestHostClock(t *testing.T) {
	h, err := openHostClock()
	require.NoError(t, err)
	defer h.close()
	assert.False(t, h.slept())
	for range 3 {
		nudge(t)
		select {
		case <-h.changed:
		case <-time.After(10 * time.Second):
			require.Fail(t, "nothing told that the clock was set")
		}
	}
	h.asleep -= time.Second
	assert.True(t, h.slept())
	assert.False(t, h.slept())
}

// When the host's clock is set all guests are asked at once, whatever the interval.
func TestGuestsFollowTheHostsClock(t *testing.T) {
	n := newNode(t)
	n.run("a")
	clock := &n.driver.only(t).clock
	keepClocks(t, n, time.Hour)
	// Those that are found are asked soon; this is not about that.
	require.Eventually(t, func() bool { _, asked := clock.get(); return asked > 0 }, 2*clockSpread, time.Millisecond)
	time.Sleep(50 * time.Millisecond)
	clock.set(func(c *fakeClock) { c.off = time.Minute })
	nudge(t)
	n.awaitClock("after the host's was set", clock)
}
