// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmpool

import "time"

// Demand says how the pool follows what is asked of it.
type Demand struct {
	// Min and Max bound the number of ready VMs.
	Min, Max int
	// Window is the time in which the pool cannot follow: about as long as it takes
	// to make a VM ready, times those that are made one after the other.
	Window time.Duration
	// Horizon is for how long a burst is remembered in full; after that the pool
	// shrinks by half each Horizon.
	Horizon time.Duration
}

// maxArrivals bounds what is remembered.
const maxArrivals = 4096

// Target is how many VMs should be ready at the time now, given when pods came
// (in ascending order). It is the greatest number of pods that came within one
// Window, each Window's number halved for every Horizon that has passed since,
// so that a burst finds the pool ready if one like it came not long ago, and a
// pod an hour keeps nobody's memory. Beyond Min it grows by what was asked, and
// never beyond Max. It is a pure function.
func (d Demand) Target(arrivals []time.Time, now time.Time) int {
	want := 0
	first := 0
	for last, at := range arrivals {
		for at.Sub(arrivals[first]) > d.Window {
			first++
		}
		n := last - first + 1
		age := now.Sub(at)
		for age > d.Horizon && n > 0 {
			n /= 2
			age -= d.Horizon
		}
		want = max(want, n)
	}
	return min(max(want, d.Min), d.Max)
}

// Next is when Target will be less than it is now if no pod comes, or the zero
// time if never: it is when to look again.
func (d Demand) Next(arrivals []time.Time, now time.Time) time.Time {
	current := d.Target(arrivals, now)
	if current <= d.Min {
		return time.Time{}
	}
	// Each Window's number changes at whole Horizons after its last pod.
	var next time.Time
	for _, at := range arrivals {
		steps := now.Sub(at)/d.Horizon + 1
		if change := at.Add(steps * d.Horizon).Add(1); next.IsZero() || change.Before(next) {
			next = change
		}
	}
	return next
}

// Forget drops arrivals that count for nothing any more, and the oldest of too
// many.
func (d Demand) Forget(arrivals []time.Time, now time.Time) []time.Time {
	// After 13 halvings nothing is left of maxArrivals.
	old := now.Add(-13 * d.Horizon)
	i := max(0, len(arrivals)-maxArrivals)
	for i < len(arrivals) && arrivals[i].Before(old) {
		i++
	}
	return arrivals[i:]
}
