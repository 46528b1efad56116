// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmpool

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

var (
	testDemand = Demand{Min: 2, Max: 32, Window: 5 * time.Second, Horizon: 10 * time.Minute}
	testStart  = time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
)

// every makes n arrivals, one each step.
func every(from time.Time, step time.Duration, n int) []time.Time {
	var list []time.Time
	for i := range n {
		list = append(list, from.Add(time.Duration(i)*step))
	}
	return list
}

// hits replays arrivals against a pool that is as large as Target says, and that
// takes refill to make one VM, and counts the pods that found one ready.
func hits(d Demand, arrivals []time.Time, refill time.Duration) int {
	ready, count := d.Min, 0
	last := arrivals[0]
	for i, at := range arrivals {
		target := d.Target(arrivals[:i], at)
		ready = min(target, ready+int(at.Sub(last)/refill))
		last = at
		if ready > 0 {
			ready--
			count++
		}
	}
	return count
}

func TestTarget(t *testing.T) {
	t.Parallel()
	burst := every(testStart, 10*time.Millisecond, 20)
	end := burst[len(burst)-1]
	for name, c := range map[string]struct {
		arrivals []time.Time
		now      time.Time
		want     int
	}{
		"nothing came":           {nil, testStart, 2},
		"one pod an hour":        {every(testStart, time.Hour, 24), testStart.Add(24 * time.Hour), 2},
		"steady, one a second":   {every(testStart, time.Second, 600), testStart.Add(10 * time.Minute), 6},
		"a burst just now":       {burst, end, 20},
		"a burst, remembered":    {burst, end.Add(9 * time.Minute), 20},
		"a burst, half":          {burst, end.Add(11 * time.Minute), 10},
		"a burst, a quarter":     {burst, end.Add(21 * time.Minute), 5},
		"a burst, forgotten":     {burst, end.Add(2 * time.Hour), 2},
		"more than the cap":      {every(testStart, time.Millisecond, 100), testStart.Add(time.Second), 32},
		"two bursts, the larger": {append(every(testStart.Add(-5*time.Minute), time.Millisecond, 8), burst...), end, 20},
		"the clock goes back":    {burst, testStart.Add(-time.Hour), 20},
	} {
		assert.Equal(t, c.want, testDemand.Target(c.arrivals, c.now), name)
	}
	assert.Equal(t, 0, Demand{Max: 0, Window: time.Second, Horizon: time.Minute}.Target(burst, end), "a pool of none")
}

func TestNext(t *testing.T) {
	t.Parallel()
	arrivals := every(testStart, 10*time.Millisecond, 20)
	now := arrivals[19]
	for range 10 {
		target := testDemand.Target(arrivals, now)
		next := testDemand.Next(arrivals, now)
		if next.IsZero() {
			assert.Equal(t, testDemand.Min, target)
			return
		}
		assert.True(t, next.After(now))
		now = next
	}
	// Each of the 20 arrivals halves at its own time.
	for range 200 {
		next := testDemand.Next(arrivals, now)
		if next.IsZero() {
			return
		}
		now = next
	}
	t.Fatal("the pool never gets back to its least size")
}

func TestReplay(t *testing.T) {
	t.Parallel()
	onOff := []time.Time{}
	for i := range 10 {
		onOff = append(onOff, every(testStart.Add(time.Duration(i)*2*time.Minute), 100*time.Millisecond, 12)...)
	}
	for name, c := range map[string]struct {
		arrivals []time.Time
		least    int
	}{
		"steady, one a second":       {every(testStart, time.Second, 300), 295},
		"one pod an hour":            {every(testStart, time.Hour, 24), 24},
		"on and off, 12 at a time":   {onOff, 12*10 - 12},
		"one burst into a cold pool": {every(testStart, 10*time.Millisecond, 20), 2},
	} {
		assert.GreaterOrEqual(t, hits(testDemand, c.arrivals, 500*time.Millisecond), c.least, name)
	}
}

func TestForget(t *testing.T) {
	t.Parallel()
	old, recent := every(testStart, time.Second, 5), every(testStart.Add(3*time.Hour), time.Second, 5)
	assert.Equal(t, recent, testDemand.Forget(append(old, recent...), recent[4]))
	assert.Len(t, testDemand.Forget(every(testStart, time.Millisecond, 10000), testStart.Add(10*time.Second)), maxArrivals)
}
