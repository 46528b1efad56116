// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"google.golang.org/protobuf/types/known/timestamppb"

	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

const (
	// clockTolerance is by how much a guest's clock may be off, besides what the way
	// to the guest leaves unknown.
	clockTolerance = time.Millisecond
	// clockTries is how often a guest is asked, as long as its answers take longer
	// than clockDelay: what an answer says is uncertain by half the time it took.
	clockTries = 3
	clockDelay = 10 * time.Millisecond
	// clockLag is how long the way of a guest's configuration may take: the clock that
	// it sets is off by no more. After a longer one it is looked at again before the
	// pod is ready.
	clockLag = 20 * time.Millisecond
	// clockParallel is how many guests are asked at a time, and clockPatience how
	// long one counts: a silent one holds up no other.
	clockParallel = 4
	clockPatience = time.Second
	// clockSpread is over which time the guests are asked that were found.
	clockSpread = 5 * time.Second
	// clockBatch is the part of the interval within which guests are asked together,
	// so that many of them do not make many wake-ups.
	clockBatch = 64
)

// What a look at a guest's clock led to.
const (
	clockKept    = "kept"
	clockSlewed  = "slewed"
	clockStepped = "stepped"
)

// clockResults are the values of a label.
var clockResults = []string{clockKept, clockSlewed, clockStepped, resultError}

// clockSample is how far a guest's clock is ahead of the host's, which is known
// to within half the delay.
type clockSample struct {
	offset, delay time.Duration
}

// wrong is true if the clock is off by more than the measurement.
func (s clockSample) wrong() bool { return s.offset.Abs() > clockTolerance+s.delay/2 }

// syncClock compares a guest's clock with the host's and has it put right.
func (c *Controller) syncClock(ctx context.Context, vm vmm.VM) (string, error) {
	once := "" // what was done before
	for range clockTries {
		best, err := c.measureClock(ctx, vm)
		if err != nil {
			return resultError, err
		}
		if !best.wrong() {
			return cmp.Or(once, clockKept), nil
		}
		_, stepped, err := c.askClock(ctx, vm, -best.offset)
		if err != nil {
			return resultError, err
		}
		if !stepped {
			return cmp.Or(once, clockSlewed), nil
		}
		// Who stops for a while between the two calls is wrong again.
		once = clockStepped
	}
	return once, nil
}

// measureClock returns the best of some samples.
func (c *Controller) measureClock(ctx context.Context, vm vmm.VM) (best clockSample, _ error) {
	for i := range clockTries {
		s, _, err := c.askClock(ctx, vm, 0)
		if err != nil {
			return clockSample{}, err
		}
		if i == 0 || s.delay < best.delay {
			best = s
		}
		if best.delay <= clockDelay {
			break
		}
	}
	return best, nil
}

// askClock has a guest add to its clock, and tells how far it is off after that.
func (c *Controller) askClock(ctx context.Context, vm vmm.VM, add time.Duration) (s clockSample, stepped bool, _ error) {
	resp, err := callGuest(ctx, vm, c.cfg.AgentTimeout,
		func(ctx context.Context, m guestv1.MachineService) (*guestv1.SyncClockResponse, error) {
			began := time.Now()
			resp, err := m.SyncClock(ctx, &guestv1.SyncClockRequest{OffsetNsec: int64(add)})
			s.delay = time.Since(began)
			if err == nil && resp.GetClock().IsValid() {
				s.offset = resp.GetClock().AsTime().Sub(began.Add(s.delay / 2).Round(0))
			}
			return resp, err
		})
	switch {
	case err != nil:
		return s, false, fmt.Errorf("the guest's clock: %w", err)
	case !resp.GetClock().IsValid():
		return s, false, fmt.Errorf("the guest's clock: the agent answered no time: %w", errdefs.ErrFailedPrecondition)
	}
	return s, resp.GetStepped(), nil
}

// clockKeeper keeps the clocks of ready sandboxes' guests right: of each now and
// then, and of all when the host's was set or the host slept. A guest's clock
// goes wrong when its VMM stands still, and by itself as all clocks do.
type clockKeeper struct {
	c     *Controller
	every time.Duration
	slots chan struct{}
	wg    sync.WaitGroup

	mu sync.Mutex
	// asked are the sandboxes whose guest has yet to answer, again those of them that
	// are to be asked once more then: the host's clock may have been set between.
	// failing are those whose last look failed.
	asked, again, failing map[*pod]bool
}

// KeepClocks begins to keep the guests' clocks right, unless the configuration
// says not to, until Close. Call it after Recover.
func (c *Controller) KeepClocks() {
	if c.cfg.ClockSync == 0 {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	k := &clockKeeper{
		c: c, every: c.cfg.ClockSync, slots: make(chan struct{}, clockParallel),
		asked: map[*pod]bool{}, again: map[*pod]bool{}, failing: map[*pod]bool{},
	}
	host, err := openHostClock()
	if err != nil {
		log.G(ctx).WithError(err).Warn("nothing tells when the host's clock is set; guests' follow within clock_sync")
	}
	k.wg.Go(func() { k.run(ctx, host) })
	c.clocks = func() {
		cancel()
		host.close()
		k.wg.Wait()
	}
}

// run asks each guest when it is due.
func (k *clockKeeper) run(ctx context.Context, host *hostClock) {
	// Those that are there now have been without us for a while.
	due, first := map[*pod]time.Time{}, min(clockSpread, k.every)
	least := time.Duration(0)
	for {
		next := k.round(ctx, due, least, first)
		least, first = k.every/2, k.every
		timer := time.NewTimer(time.Until(next))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-host.changed:
			log.G(ctx).Info("the host's clock was set, or the host slept; all guests' clocks are looked at")
			clear(due)
			least, first = 0, 0
		case <-timer.C:
			if host.slept() {
				clear(due)
				least, first = 0, 0
			}
		}
		timer.Stop()
	}
}

// round asks those that are due, and returns when the next are. One that has none
// yet is due within the given times. It waits for no guest.
func (k *clockKeeper) round(ctx context.Context, due map[*pod]time.Time, least, most time.Duration) time.Time {
	now := time.Now()
	next, together := now.Add(k.every), now.Add(k.every/clockBatch)
	alive := map[*pod]bool{}
	for _, p := range k.c.allPods() {
		vm, err := p.machine()
		if err != nil {
			continue
		}
		alive[p] = true
		at, ok := due[p]
		if !ok {
			at = now.Add(least)
			if most > least {
				at = at.Add(rand.N(most - least))
			}
		}
		if !at.After(together) {
			k.ask(ctx, p, vm)
			at = now.Add(k.every)
		}
		due[p] = at
		if at.Before(next) {
			next = at
		}
	}
	maps.DeleteFunc(due, func(p *pod, _ time.Time) bool { return !alive[p] })
	k.mu.Lock()
	defer k.mu.Unlock()
	maps.DeleteFunc(k.failing, func(p *pod, _ bool) bool { return !alive[p] })
	return next
}

// ask has one guest's clock put right, or once more if it has yet to answer.
func (k *clockKeeper) ask(ctx context.Context, p *pod, vm vmm.VM) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.asked[p] {
		k.again[p] = true
		return
	}
	k.asked[p] = true
	k.wg.Go(func() {
		ctx, cancel := context.WithCancel(withPod(ctx, p.id))
		defer cancel()
		go func() { // the sandbox's end is the call's
			select {
			case <-p.exited:
				cancel()
			case <-ctx.Done():
			}
		}()
		for more := true; more; {
			err := k.inTurn(ctx, vm)
			more = k.note(ctx, p, err)
		}
	})
}

// inTurn looks at a clock when there is room. The call of a guest that does not
// answer goes on without a place, so that one that was stopped is put right as
// soon as it goes on.
func (k *clockKeeper) inTurn(ctx context.Context, vm vmm.VM) error {
	select {
	case k.slots <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	leave := sync.OnceFunc(func() { <-k.slots })
	defer leave()
	defer time.AfterFunc(clockPatience, leave).Stop()
	result, err := k.c.syncClock(ctx, vm)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	clockCounter.WithValues(result).Inc()
	if result == clockStepped {
		log.G(ctx).Info("set a guest's clock, which was off")
	}
	return err
}

// note logs the first of several failures, and returns whether to ask once more.
func (k *clockKeeper) note(ctx context.Context, p *pod, err error) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	again, failed := k.again[p] && err == nil, k.failing[p]
	delete(k.again, p)
	delete(k.failing, p)
	if again && ctx.Err() == nil {
		return true
	}
	delete(k.asked, p)
	if err == nil || ctx.Err() != nil {
		return false
	}
	k.failing[p] = true
	if !failed {
		log.G(ctx).WithError(err).Warn("cannot keep a guest's clock right; it will be tried again")
	}
	return false
}

// stampedConfigure configures a guest with a clock as late as can be, and looks at
// the clock again if the way there took long.
func (c *Controller) stampedConfigure(ctx context.Context, vm vmm.VM, req *guestv1.ConfigureRequest) (*guestv1.ConfigureResponse, error) {
	var took time.Duration
	resp, err := callGuest(ctx, vm, c.cfg.AgentTimeout,
		func(ctx context.Context, m guestv1.MachineService) (*guestv1.ConfigureResponse, error) {
			began := time.Now()
			req.Clock = timestamppb.New(began)
			resp, err := m.Configure(ctx, req)
			took = time.Since(began)
			return resp, err
		})
	if err != nil {
		return nil, err
	}
	for _, step := range resp.GetSteps()[:min(len(resp.GetSteps()), maxGuestSteps)] {
		took -= time.Duration(min(step.GetUsec(), uint64(max(took, 0)/time.Microsecond))) * time.Microsecond
	}
	if took > clockLag {
		// The clock was set, so what fails now is made good later.
		if _, err := c.syncClock(ctx, vm); err != nil {
			log.G(ctx).WithError(err).Warn("cannot look at a guest's clock again")
		}
	}
	return resp, nil
}
