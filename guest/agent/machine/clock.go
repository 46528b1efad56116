// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package machine

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// slewLimit is up to where the clock is made to go faster or slower, in place of
// being set. The kernel does half a millisecond a second, so it takes forty at most.
const slewLimit = 20 * time.Millisecond

// SyncClock implements the Machine service. It waits for nobody: a Configure or
// Resize may be under way.
func (s *Service) SyncClock(ctx context.Context, r *guestv1.SyncClockRequest) (*guestv1.SyncClockResponse, error) {
	offset := time.Duration(r.GetOffsetNsec())
	stepped := offset.Abs() > slewLimit
	var err error
	switch {
	case offset == 0:
	case stepped:
		log.G(ctx).WithField("by", offset).Info("setting the clock")
		err = s.cfg.System.StepClock(offset)
	default:
		err = s.cfg.System.SlewClock(offset)
	}
	if err != nil {
		return nil, err
	}
	return &guestv1.SyncClockResponse{Clock: timestamppb.New(s.cfg.System.Now()), Stepped: stepped}, nil
}

// Now is the time of day.
func (VM) Now() time.Time { return time.Now() }

// SetClock sets the time of day.
func (VM) SetClock(t time.Time) error {
	ts := unix.NsecToTimespec(t.UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return fmt.Errorf("set clock: %w", err)
	}
	return nil
}

// StepClock adds to the time of day at once. What is left of a SlewClock is
// dropped, as the offset was measured with it.
func (v VM) StepClock(by time.Duration) error {
	if err := v.SlewClock(0); err != nil {
		return err
	}
	// The nanoseconds, which are never negative, are in the field for microseconds.
	ts := unix.NsecToTimespec(by.Nanoseconds())
	t := unix.Timex{Modes: unix.ADJ_SETOFFSET | unix.ADJ_NANO, Time: unix.Timeval{Sec: ts.Sec, Usec: ts.Nsec}}
	if _, err := unix.Adjtimex(&t); err != nil {
		return fmt.Errorf("set clock by %s: %w", by, err)
	}
	return nil
}

// SlewClock makes the time of day go faster or slower until it has gained or lost
// so much, to the microsecond, in place of what an earlier call has left.
func (VM) SlewClock(by time.Duration) error {
	t := unix.Timex{Modes: unix.ADJ_OFFSET_SINGLESHOT, Offset: by.Microseconds()}
	if _, err := unix.Adjtimex(&t); err != nil {
		return fmt.Errorf("adjust clock by %s: %w", by, err)
	}
	return nil
}
