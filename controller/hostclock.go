// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"errors"
	"fmt"
	"math"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// hostClock tells when the host's clock was set, or the host has slept.
type hostClock struct {
	// changed gets a value some time after each change; of several it may be one.
	changed chan struct{}
	// timer is never due. Reading from it fails when the clock is set, which a wake-up
	// of the host does too.
	timer  *os.File
	served sync.WaitGroup
	// asleep is how long the host has slept since it booted.
	asleep time.Duration
}

// sleepSlack is what the readings of two clocks may differ by.
const sleepSlack = 100 * time.Millisecond

// openHostClock begins to watch. After an error what it returns knows of sleep
// alone. Close it.
func openHostClock() (*hostClock, error) {
	h := &hostClock{changed: make(chan struct{}, 1), asleep: timeAsleep()}
	fd, err := unix.TimerfdCreate(unix.CLOCK_REALTIME, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		return h, fmt.Errorf("watch the host's clock: %w", err)
	}
	timer := os.NewFile(uintptr(fd), "timerfd")
	if err := armTimer(fd); err != nil {
		return h, errors.Join(fmt.Errorf("watch the host's clock: %w", err), timer.Close())
	}
	h.timer = timer
	h.served.Go(h.serve)
	return h, nil
}

func armTimer(fd int) error {
	never := &unix.ItimerSpec{Value: unix.Timespec{Sec: math.MaxInt32 << 8}}
	return unix.TimerfdSettime(fd, unix.TFD_TIMER_ABSTIME|unix.TFD_TIMER_CANCEL_ON_SET, never, nil)
}

// serve waits in the runtime's poller, without a thread.
func (h *hostClock) serve() {
	for buf := make([]byte, 8); ; {
		if _, err := h.timer.Read(buf); !errors.Is(err, unix.ECANCELED) {
			return // it was closed
		}
		select {
		case h.changed <- struct{}{}:
		default:
		}
	}
}

// slept is true if the host has slept since the last call.
func (h *hostClock) slept() bool {
	before := h.asleep
	h.asleep = timeAsleep()
	return h.asleep > before+sleepSlack
}

func (h *hostClock) close() {
	if h.timer != nil {
		_ = h.timer.Close()
		h.served.Wait()
	}
}

// timeAsleep is by how much the clock that counts sleep is ahead of the one that
// does not.
func timeAsleep() time.Duration {
	var all, awake unix.Timespec
	if err := errors.Join(unix.ClockGettime(unix.CLOCK_BOOTTIME, &all), unix.ClockGettime(unix.CLOCK_MONOTONIC, &awake)); err != nil {
		return 0
	}
	return time.Duration(all.Nano() - awake.Nano())
}
