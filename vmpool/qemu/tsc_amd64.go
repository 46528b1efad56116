// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package qemu

import "time"

// rdtsc reads the processor's time-stamp counter.
func rdtsc() uint64

// tscWindow is how long the counter is watched. Reading the clock beside it
// costs well under a microsecond, which makes the result good to some 0.01 %.
const tscWindow = 20 * time.Millisecond

// tscKHz measures the frequency of the host's time-stamp counter, in kHz, which
// is what QEMU's software emulation shows to its guest. A guest that finds it out
// by itself, against an emulated timer on a busy host, has been seen to be wrong
// by a factor of a hundred, and then so is its clock.
func tscKHz() uint64 {
	var best, spread uint64
	for range 3 {
		from, start, gap0 := stamp()
		time.Sleep(tscWindow)
		to, end, gap1 := stamp()
		khz := (to - from) * 1000 / uint64(end.Sub(start).Microseconds())
		if gap := gap0 + gap1; best == 0 || gap < spread {
			best, spread = khz, gap
		}
	}
	return best
}

// stamp reads counter and clock together, and tells how many ticks that took: few
// unless something came between.
func stamp() (tsc uint64, at time.Time, gap uint64) {
	before := rdtsc()
	at = time.Now()
	after := rdtsc()
	return before + (after-before)/2, at, after - before
}
