// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// Exit statuses that Wait answers.
const (
	exitOK     = 0
	exitKilled = 137
)

// maxCause bounds a cause, in bytes: it holds the last lines of a VMM's log.
const maxCause = 2048

// ending is the ending of a sandbox: one at a time, and at its own pace, however
// many ask for it and whenever they leave.
type ending struct {
	done chan struct{}
	// err says what is left, after done; another ending may be tried.
	err error
}

// endReason says why a sandbox ends.
type endReason struct {
	// cause is for people, label for metrics.
	cause, label string
	// graceful asks the guest to turn itself off.
	graceful bool
	// status is what Wait answers.
	status uint32
}

// end begins the ending of a sandbox, or joins it. A sandbox that has ended
// without an error needs no other. A Start under way is cancelled, and undoes
// itself before; that is decided under the pod's lock, under which a Start begins
// and succeeds, so neither can miss the other.
func (c *Controller) end(ctx context.Context, p *pod, why endReason) *ending {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e := p.ending; e != nil && (!isClosed(e.done) || e.err == nil) {
		return e
	}
	e := &ending{done: make(chan struct{})}
	p.ending = e
	starting := p.cancelStart != nil && !isClosed(p.started)
	if starting {
		p.cancelStart(errStopped)
	}
	go func() {
		defer close(e.done)
		if starting {
			<-p.started
		}
		if p.hasEnded() {
			return // Start has undone everything
		}
		ctx, cancel := c.cleanup(ctx)
		defer cancel()
		e.err = c.endNow(ctx, p, why)
	}()
	return e
}

// endStart ends what a failed Start has begun. It does so also if somebody else
// ends the sandbox: that one waits for the Start.
func (c *Controller) endStart(ctx context.Context, p *pod, why endReason) error {
	ctx, cancel := c.cleanup(ctx)
	defer cancel()
	p.mu.Lock()
	var mine *ending
	if p.ending == nil {
		mine = &ending{done: make(chan struct{})}
		p.ending = mine
	}
	p.mu.Unlock()
	err := c.endNow(ctx, p, why)
	if mine != nil {
		mine.err = err
		close(mine.done)
	}
	return err
}

// endNow ends the VM and then removes what it used: TAPs, redirections,
// cgroup, scratch disk. The shim stays, to tell how the containers ended.
func (c *Controller) endNow(ctx context.Context, p *pod, why endReason) (retErr error) {
	ctx, watch := begin(ctx, endVerb, p.id)
	defer func() { watch.end(ctx, retErr) }()
	why.cause = printable(p.withLoss(ctx, why.cause), maxCause)
	p.force(ctx, failpoint.EndRecord, func(r *record) {
		r.State = StateStopping
		if r.Cause == "" {
			r.Cause, r.ExitStatus = why.cause, why.status
		}
	})
	p.awaitMove(ctx)
	rec := p.snapshot()
	left := c.shimLeaves(ctx, p, rec.Cgroup)
	vm, gone, err := c.endVM(ctx, p, why.graceful, watch)
	errs := []error{err, watch.time(ctx, "network", func(ctx context.Context) error {
		if err := failpoint.At(ctx, failpoint.EndNetwork); err != nil {
			return err
		}
		return c.network.Disconnect(ctx, rec.NetNS)
	})}
	if gone {
		errs = append(errs, watch.time(ctx, "files", func(ctx context.Context) error {
			return errors.Join(c.removeScratch(ctx, rec.Scratch), leavePod(ctx, rec.Cgroup, <-left))
		}))
	}
	if err := errors.Join(errs...); err != nil || !gone {
		if gone {
			p.markExited()
		}
		return sentinel(fmt.Errorf("end sandbox %q: %w", p.id, errors.Join(err, notGone(gone))), errdefs.ErrInternal)
	}
	p.force(ctx, failpoint.EndStopped, func(r *record) {
		r.State = StateStopped
		r.ExitedAt = exitTime(vm)
	})
	c.users.Release(rec.UID, p.id)
	if vm != nil {
		err = vm.Close()
	}
	p.markExited()
	c.noteEnd(ctx, p, why, watch)
	return errors.Join(err, failpoint.At(ctx, failpoint.EndDone))
}

// withLoss adds to a cause why the shim gave up the guest before, as that is what
// made people end the sandbox. Of a VM that has ended the shim knows no more than
// that it has.
func (p *pod) withLoss(ctx context.Context, cause string) string {
	if proc, err := p.process(); err == nil && (proc == nil || isClosed(proc.Done())) {
		return cause
	}
	loss, err := p.loss()
	if err != nil {
		log.G(ctx).WithError(err).Warn("cannot find out whether the shim gave up the guest")
	}
	if loss == "" {
		return cause
	}
	// Quoted, as the words may be the guest's.
	return cause + "; the shim gave up the guest before: " + strconv.Quote(loss)
}

// endVM ends the sandbox's VMM, and returns whether it has gone.
func (c *Controller) endVM(ctx context.Context, p *pod, graceful bool, watch *stopwatch) (vmProcess, bool, error) {
	proc, err := p.process()
	if err != nil {
		return nil, false, fmt.Errorf("take hold of the VM: %w", err)
	}
	if proc == nil {
		return nil, true, nil
	}
	vm := p.handle()
	if graceful && vm != nil && !isClosed(vm.Done()) {
		err := watch.time(ctx, "power_off", func(ctx context.Context) error {
			if err := failpoint.At(ctx, failpoint.EndPowerOff); err != nil {
				return err
			}
			return c.powerOff(ctx, vm)
		})
		if err != nil {
			log.G(ctx).WithError(err).Warn("the guest did not turn itself off in time")
		}
	}
	err = watch.time(ctx, "kill", func(ctx context.Context) error {
		if err := failpoint.At(ctx, failpoint.EndKill); err != nil {
			return err
		}
		return proc.Kill(ctx)
	})
	return proc, isClosed(proc.Done()), err
}

func notGone(gone bool) error {
	if gone {
		return nil
	}
	return fmt.Errorf("the VM still runs: %w", errdefs.ErrUnavailable)
}

func exitTime(vm vmProcess) time.Time {
	if vm != nil {
		if at := vm.Exit().At; !at.IsZero() {
			return at.UTC().Round(0)
		}
	}
	return now()
}

func (c *Controller) noteEnd(ctx context.Context, p *pod, why endReason, watch *stopwatch) {
	endTimer.UpdateSince(watch.start)
	endCounter.WithValues(why.label).Inc()
	rec := p.snapshot()
	log.G(ctx).WithFields(log.Fields{
		"pid": vmmPid(&rec), "cause": rec.Cause,
		"total": time.Since(watch.start).Round(100 * time.Microsecond), "phases": phasesText(watch.list()),
	}).Info("ended sandbox")
}

// force changes the record also if it cannot be written, as on a full disk: what
// has ended has ended, recovery finds that out from an older record too, and
// only when the sandbox is removed does the disk get room.
func (p *pod) force(ctx context.Context, point failpoint.Point, change func(*record)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.removed {
		return
	}
	change(&p.rec)
	if err := p.save(ctx, point); err != nil {
		log.G(ctx).WithError(err).WithField("state", p.rec.State).Error("cannot record what became of a sandbox")
	}
}

// markExited lets Wait return.
func (p *pod) markExited() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !isClosed(p.exited) {
		close(p.exited)
	}
}

// watch ends the sandbox when its VM or its shim does. Its goroutine ends with
// the sandbox, or with vm if that is not the sandbox's any more.
func (c *Controller) watch(ctx context.Context, p *pod, vm vmProcess, s *shim) {
	ctx = untraced(ctx)
	go func() {
		var why endReason
		select {
		case <-p.exited:
			return
		case <-vm.Done():
			why = endReason{cause: vmCause(vm.Exit()), label: "vm", status: exitKilled}
		case <-s.done():
			why = endReason{
				cause: fmt.Sprintf("the shim (pid %d) ended unexpectedly", s.id.Pid), label: "shim", status: exitKilled,
			}
		}
		if !p.isWatched(vm) {
			return
		}
		log.G(ctx).WithFields(log.Fields{
			"pid": vm.State().Pid, "shim": s.id.Pid, "cause": why.cause,
		}).Error("sandbox ends unexpectedly")
		e := c.end(ctx, p, why)
		<-e.done
		if e.err != nil {
			log.G(ctx).WithError(e.err).Error("cannot end sandbox")
		}
	}()
}

func vmCause(exit vmm.Exit) string {
	if exit.Cause == "" {
		return "the VM ended"
	}
	return "the VM ended: " + exit.Cause
}

func (p *pod) hasEnded() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.removed || p.rec.State == StateStopped
}

// remove removes what is left of a sandbox that has ended: shim, network, pins,
// directory. It can be repeated.
func (c *Controller) remove(ctx context.Context, p *pod) error {
	ctx, cancel := c.cleanup(ctx)
	defer cancel()
	if err := lockChan(ctx, p.removing); err != nil {
		return fmt.Errorf("remove sandbox %q: %w", p.id, err)
	}
	defer func() { <-p.removing }()
	p.mu.Lock()
	s, removed, rec := p.shim, p.removed, p.rec
	p.mu.Unlock()
	if removed {
		return nil
	}
	if rec.State != StateStopped {
		return fmt.Errorf("remove sandbox %q: it has not ended: %w", p.id, errdefs.ErrFailedPrecondition)
	}
	if err := c.removeParts(ctx, p, s, &rec); err != nil {
		return fmt.Errorf("remove sandbox %q: %w", p.id, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.shim = nil
	if err := p.removeDir(ctx); err != nil {
		return fmt.Errorf("remove sandbox %q: %w", p.id, sentinel(err, errdefs.ErrInternal))
	}
	p.removed = true
	for key, img := range p.pins {
		img.Release()
		delete(p.pins, key)
	}
	c.drop(p)
	return failpoint.At(ctx, failpoint.RemoveDone)
}

// removeParts removes what a sandbox that has ended still has outside of its directory.
func (c *Controller) removeParts(ctx context.Context, p *pod, s *shim, rec *record) error {
	for _, part := range []struct {
		before failpoint.Point
		remove func() error
	}{
		{failpoint.RemoveShim, func() error { return endShim(ctx, s, rec.Shim) }},
		{failpoint.RemoveGroups, func() error { return c.removeShimGroups(ctx, p.id, rec.Cgroup) }},
		// By CRI it has gone with its namespace.
		{failpoint.RemoveNetwork, func() error { return c.network.Clear(ctx, rec.NetNS) }},
		{failpoint.RemoveVM, func() error { return c.forgetVM(ctx, rec) }},
	} {
		if err := failpoint.At(ctx, part.before); err != nil {
			return err
		}
		if err := part.remove(); err != nil {
			return err
		}
	}
	return nil
}

// removeDir removes the sandbox's directory, and with it the record.
func (p *pod) removeDir(ctx context.Context) error {
	if err := failpoint.At(ctx, failpoint.RemoveDir); err != nil {
		return err
	}
	return os.RemoveAll(p.dir)
}
