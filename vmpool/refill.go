// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmpool

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
	"github.com/cloudhv/containerd-cloudhv/vmpool/snapshot"
)

const (
	// firstPause is the pause after a failure, which doubles up to longestPause.
	firstPause   = time.Second
	longestPause = time.Minute
)

// Run starts to keep the pool filled. Call it once, after Recover; Close ends it.
func (p *Pool) Run() {
	if !p.cfg.Off {
		p.wg.Go(p.run)
	}
}

// Close stops the refill and lets go of the ready VMs, which go on: the next
// process adopts them. It waits for what is being made.
func (p *Pool) Close() error {
	p.cancel()
	p.wg.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	for _, vm := range p.ready {
		errs = append(errs, vm.Close())
	}
	p.ready = nil
	return errors.Join(errs...)
}

// run makes the pool as large as it should be, whenever something changes.
func (p *Pool) run() {
	for p.ctx.Err() == nil {
		p.lookAtMemory(p.ctx)
		snap, err := p.snapshot()
		if err != nil {
			p.failed(err)
		} else {
			p.fit(snap)
		}
		timer := time.NewTimer(p.nextLook())
		select {
		case <-p.wake:
		case <-timer.C:
		case <-p.ctx.Done():
		}
		timer.Stop()
	}
}

// snapshot finds the base snapshot, or makes it, unless a failure says wait.
func (p *Pool) snapshot() (*snapshot.Snapshot, error) {
	snap, err := p.cfg.Store.Peek(p.key)
	if err == nil {
		return snap, nil
	}
	p.dropIf(err)
	if p.paused() {
		return nil, nil
	}
	_, err = p.cfg.Store.Find(p.ctx, p.cfg.Inputs)
	p.dropIf(err)
	snap, err = p.cfg.Store.Make(p.ctx, p.cfg.Inputs, p.makeSnapshot)
	if err != nil {
		failCounter.WithValues("snapshot").Inc()
		return nil, err
	}
	p.putInUse(snap)
	return snap, nil
}

// dropIf ends all ready VMs if err says that the snapshot was damaged: they map its
// memory, and see what is changed in it.
func (p *Pool) dropIf(err error) {
	if !errdefs.IsDataLoss(err) {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.ready) > 0 {
		p.letGo(p.pull(0))
	}
}

// failed notes a failure and the pause that it costs.
func (p *Pool) failed(err error) {
	if p.ctx.Err() != nil {
		return
	}
	p.mu.Lock()
	p.lastErr = err
	if time.Now().Before(p.until) {
		p.mu.Unlock()
		return // of those that were made side by side one counts
	}
	p.failures++
	pause := min(firstPause<<min(p.failures-1, 10), longestPause)
	p.until = time.Now().Add(pause)
	p.notify()
	p.mu.Unlock()
	log.G(p.ctx).WithError(err).WithField("pause", pause).Error("the pool cannot be filled; pods boot or restore their VMs")
}

// paused is true in the pause after a failure.
func (p *Pool) paused() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return time.Now().Before(p.until)
}

// nextLook is how long nothing will change by itself.
func (p *Pool) nextLook() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	next := now.Add(time.Hour)
	if p.cfg.Available != nil && p.cfg.Demand.Max > 0 && !p.drained {
		next = now.Add(memoryLook)
	}
	for _, arrivals := range [][]time.Time{p.arrivals, p.asked} {
		if at := p.cfg.Demand.Next(arrivals, now); !at.IsZero() && at.Before(next) {
			next = at
		}
	}
	if now.Before(p.until) && p.until.Before(next) {
		next = p.until
	}
	return next.Sub(now)
}

// target is how many VMs should be ready, under p.mu.
func (p *Pool) target() int {
	if p.drained {
		return 0
	}
	now := time.Now()
	want := max(p.cfg.Demand.Target(p.arrivals, now), p.cfg.Demand.Target(p.asked, now))
	return p.fitMemory(min(want, p.limit()))
}

// limit is how many VMs may be ready.
func (p *Pool) limit() int {
	if p.cfg.MaxMemory > 0 && p.cfg.VMMemory > 0 {
		return min(p.cfg.Demand.Max, int(p.cfg.MaxMemory/p.cfg.VMMemory))
	}
	return p.cfg.Demand.Max
}

// fit starts to make VMs that are missing, ends those that are too many, and
// replaces those of an older snapshot, each when another is begun.
func (p *Pool) fit(snap *snapshot.Snapshot) {
	p.mu.Lock()
	defer p.mu.Unlock()
	target := p.target()
	if snap != nil {
		p.current = snap.ID
	}
	for len(p.ready) > target {
		p.letGo(p.pull(p.least()))
	}
	if snap == nil || time.Now().Before(p.until) {
		return
	}
	more := max(0, min(target-len(p.ready)-p.making, p.cfg.Parallel-p.making))
	for ; p.making+more < p.cfg.Parallel; more++ {
		i := p.least()
		if i < 0 || p.isCurrent(p.ready[i]) {
			break
		}
		p.letGo(p.pull(i))
	}
	p.making += more
	for range more {
		p.wg.Go(func() { p.add(snap) })
	}
}

// least is the ready VM that is missed least, under p.mu, or -1: one of an older
// snapshot, or the youngest, as the eldest is the warmest in the host's cache.
func (p *Pool) least() int {
	old := slices.IndexFunc(p.ready, func(vm *VM) bool { return !p.isCurrent(vm) })
	if old >= 0 {
		return old
	}
	return len(p.ready) - 1
}

// letGo begins to end a VM that was ready and is not wanted any more, under p.mu.
func (p *Pool) letGo(vm *VM) {
	p.ending++
	p.wg.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), discardLimit)
		defer cancel()
		log.G(ctx).WithField("vm", vm.ID()).Debug("ending a VM that is not needed")
		if err := p.discardSurely(ctx, vm); err != nil {
			log.G(ctx).WithError(err).WithField("vm", vm.ID()).Error("cannot end a VM")
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		p.ending--
		p.notify()
	})
}

// add makes one VM ready.
func (p *Pool) add(snap *snapshot.Snapshot) {
	defer p.poke()
	p.cfg.Turns.Yield(p.ctx)
	var vm *VM
	err := step(p.ctx, "refill", func(ctx context.Context) (err error) {
		vm, err = p.makeReady(ctx, snap)
		return err
	})
	p.mu.Lock()
	p.making--
	p.notify()
	if err == nil && p.ctx.Err() == nil {
		p.failures, p.until, p.lastErr = 0, time.Time{}, nil
		p.addReady(vm)
		p.mu.Unlock()
		return
	}
	p.mu.Unlock()
	switch {
	case err != nil:
		p.failed(err)
	default:
		_ = vm.Close() // the next process adopts it
	}
}

// makeReady restores a VM, makes it warm, and pauses it until a pod comes: it
// costs no processor time meanwhile.
func (p *Pool) makeReady(ctx context.Context, snap *snapshot.Snapshot) (_ *VM, retErr error) {
	ctx, cancel := context.WithTimeout(ctx, p.cfg.ReadyLimit)
	defer cancel()
	vm, err := p.restore(ctx, snap, Request{})
	if err != nil {
		return nil, err
	}
	defer func() {
		if retErr != nil {
			failCounter.WithValues("ready").Inc()
			retErr = p.undo(vm, retErr)
		}
	}()
	if err = failpoint.At(ctx, failpoint.RefillAnswer); err == nil {
		err = p.answer(ctx, vm)
	}
	p.Report(ctx, vm, err)
	if err != nil {
		return nil, fmt.Errorf("a restored VM: %w", err)
	}
	if p.cfg.Warm {
		if err := failpoint.At(ctx, failpoint.RefillWarmUp); err != nil {
			return nil, err
		}
		if err := p.warmUp(ctx, vm); err != nil {
			return nil, fmt.Errorf("warm up a restored VM: %w", err)
		}
	}
	if err := failpoint.At(ctx, failpoint.RefillPause); err != nil {
		return nil, err
	}
	if err := vm.Pause(ctx); err != nil {
		return nil, fmt.Errorf("pause a restored VM: %w", err)
	}
	if _, err := p.cfg.Store.Peek(p.key); errdefs.IsDataLoss(err) {
		return nil, fmt.Errorf("a VM was made ready: %w", err)
	}
	vm.rec.Ready = true
	readyTimer.UpdateSince(vm.Made)
	if err := vm.started(ctx, failpoint.RefillRecord, vm.VM); err != nil {
		return nil, err
	}
	return vm, failpoint.At(ctx, failpoint.RefillDone)
}

// addReady puts a VM into the pool, under p.mu.
func (p *Pool) addReady(vm *VM) {
	vm.taken = make(chan struct{})
	p.ready = append(p.ready, vm)
	p.notify()
	p.wg.Go(func() { p.watch(vm) })
}

// watch removes a VM that dies while it is ready.
func (p *Pool) watch(vm *VM) {
	select {
	case <-vm.Done():
	case <-vm.taken:
		return
	case <-p.ctx.Done():
		return
	}
	p.mu.Lock()
	i := slices.Index(p.ready, vm)
	if i < 0 {
		p.mu.Unlock()
		return // it was taken at the same moment
	}
	p.ready = slices.Delete(p.ready, i, i+1)
	p.notify()
	p.mu.Unlock()
	// A failure like others: where VMs die at once none is made for a while.
	err := fmt.Errorf("VM %s ended: %s: %w", vm.ID(), vm.Exit().Cause, errdefs.ErrUnavailable)
	p.failed(err)
	p.discardBad(p.ctx, vm, err)
	p.poke()
}
