// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package machine

import (
	"errors"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// fakeClock is a System whose clock a test can set.
type fakeClock struct {
	System
	now             time.Time
	slewed, stepped time.Duration
	err             error
}

func (c *fakeClock) Now() time.Time { return c.now }

func (c *fakeClock) StepClock(by time.Duration) error {
	c.now, c.stepped = c.now.Add(by), by
	return c.err
}

func (c *fakeClock) SlewClock(by time.Duration) error {
	c.slewed = by
	return c.err
}

func TestSyncClock(t *testing.T) {
	t.Parallel()
	start := time.Unix(1_700_000_000, 5)
	for _, tc := range []struct {
		by              time.Duration
		stepped, slewed time.Duration
	}{
		{by: 0},
		{by: time.Millisecond, slewed: time.Millisecond},
		{by: -slewLimit, slewed: -slewLimit},
		{by: slewLimit + 1, stepped: slewLimit + 1},
		{by: -time.Hour, stepped: -time.Hour},
		{by: 50 * 365 * 24 * time.Hour, stepped: 50 * 365 * 24 * time.Hour},
	} {
		clock := &fakeClock{now: start}
		s := New(Config{System: clock})
		resp, err := s.SyncClock(t.Context(), &guestv1.SyncClockRequest{OffsetNsec: int64(tc.by)})
		require.NoError(t, err)
		assert.Equal(t, tc.stepped, clock.stepped, tc.by)
		assert.Equal(t, tc.slewed, clock.slewed, tc.by)
		assert.Equal(t, tc.stepped != 0, resp.GetStepped(), tc.by)
		assert.True(t, start.Add(tc.stepped).Equal(resp.GetClock().AsTime()), "%v: %v", tc.by, resp.GetClock().AsTime())
	}
	broken := &fakeClock{now: start, err: errBroken}
	for _, by := range []time.Duration{time.Millisecond, time.Second} {
		_, err := New(Config{System: broken}).SyncClock(t.Context(), &guestv1.SyncClockRequest{OffsetNsec: int64(by)})
		require.ErrorIs(t, err, errBroken)
	}
	_, err := New(Config{System: broken}).SyncClock(t.Context(), &guestv1.SyncClockRequest{})
	require.NoError(t, err, "it changes nothing")
}

// TestSyncWhileConfiguring: a Configure that takes long does not hold up the clock.
func TestSyncWhileConfiguring(t *testing.T) {
	t.Parallel()
	s := New(Config{System: &fakeClock{now: time.Now()}})
	s.mu.Lock()
	defer s.mu.Unlock()
	_, err := s.SyncClock(t.Context(), &guestv1.SyncClockRequest{OffsetNsec: 1})
	require.NoError(t, err)
}

// TestRealClock moves the host's clock there and back, by too little for anybody to
// notice: what the kernel is asked has the right form.
func TestRealClock(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("root is needed")
	}
	if err := (VM{}).StepClock(time.Nanosecond); errors.Is(err, unix.EPERM) {
		t.Skip("the clock must not be set here")
	} else {
		require.NoError(t, err)
	}
	require.NoError(t, VM{}.StepClock(-time.Nanosecond))
	require.NoError(t, VM{}.SlewClock(0))
}
