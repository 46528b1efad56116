// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// How a pod of ours may come by its VM.
const (
	hit     = "hit"
	miss    = "miss"
	drained = "drained"
)

// poolLimit is how long a pool may take to be full.
const poolLimit = 10 * time.Minute

// starts measures pods one after the other: of ours those that find a VM ready, of
// runc's, and of ours those for which one is restored; and then those of a pool that
// cannot follow.
func (b *bench) starts(ctx context.Context) (retErr error) {
	pool, err := b.newNode(ctx, "bench", pool(2, 2, nil))
	if err != nil {
		return err
	}
	defer b.closeNode(ctx, pool, &retErr)
	bare, err := b.newNode(ctx, "benchm", poolOff)
	if err != nil {
		return err
	}
	defer b.closeNode(ctx, bare, &retErr)
	kinds := []func(context.Context, *report) error{
		func(ctx context.Context, r *report) error { return r.hit(ctx, pool) },
		func(ctx context.Context, r *report) error { return r.runc(ctx, pool) },
		func(ctx context.Context, r *report) error { return r.miss(ctx, bare) },
	}
	for i := range b.warmUp + b.rounds {
		r := b.report
		if i < b.warmUp {
			r = newReport() // it does not count
		}
		for j := range kinds {
			if err := awaitPool(ctx, pool, 1); err != nil {
				return err
			}
			b.complain(fmt.Sprintf("round %d", i), kinds[(i+j)%len(kinds)](ctx, r))
			if ctx.Err() != nil {
				return ctx.Err()
			}
		}
		b.progress("starts: %d of %d rounds", i+1, b.warmUp+b.rounds)
	}
	b.report.alias(runPodSandbox, runPodSandbox+"/"+hit)
	b.report.alias(firstWrite, firstWrite+"/"+hit)
	return b.drained(ctx, pool)
}

func awaitPool(ctx context.Context, n *testnode.Node, atLeast int) error {
	ctx, cancel := context.WithTimeout(ctx, testnode.Scale(poolLimit))
	defer cancel()
	return n.AwaitPool(ctx, atLeast)
}

// hit is one pod of ours that finds a VM ready, with all that is measured of a pod.
func (r *report) hit(ctx context.Context, n *testnode.Node) (retErr error) {
	exp := r.expect(sideOurs, map[string]int{
		runPodSandbox + "/" + hit: 1, firstWrite + "/" + hit: 1, createStartOwn + "/" + hit: 1, execTrue: execs, stopRemove: 1, vmmPrivate: 1, shimPrivate: 1,
	})
	defer exp.settle()
	before, err := n.Metrics(ctx)
	if err != nil {
		return err
	}
	p, err := startPod(ctx, n, testnode.CloudHV)
	defer func() {
		retErr = errors.Join(retErr, exp.removal(ctx, p))
		if after, err := n.Metrics(ctx); err == nil && retErr == nil {
			r.keepParts(before, after)
		}
	}()
	if err != nil {
		return err
	}
	info, err := p.info(ctx)
	if err != nil {
		return err
	}
	if info.Outcome != hit {
		return fmt.Errorf("the pod was a %s although a VM was ready: %w", info.Outcome, errdefs.ErrUnknown)
	}
	exp.duration(runPodSandbox+"/"+hit, p.ran(), nil)
	exp.duration(firstWrite+"/"+hit, p.first.Sub(p.start), nil)
	r.keep(p, info)
	after, err := n.Metrics(ctx)
	exp.duration(createStartOwn+"/"+hit, ownTime(spent(before, after, createSeries), spent(before, after, startSeries), info.Phases), err)
	errs := []error{err, exp.execs(ctx, p)}
	for name, pid := range map[string]int{vmmPrivate: info.VMMPid, shimPrivate: info.ShimPid} {
		m, err := processMemory(pid)
		exp.add(name, m.private, err)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// runc is one pod of runc's.
func (r *report) runc(ctx context.Context, n *testnode.Node) (retErr error) {
	exp := r.expect(sideRunC, map[string]int{runPodSandbox: 1, firstWrite: 1, execTrue: execs, stopRemove: 1, shimPrivate: 1})
	defer exp.settle()
	p, err := startPod(ctx, n, testnode.RunC)
	defer func() { retErr = errors.Join(retErr, exp.removal(ctx, p)) }()
	if err != nil {
		return err
	}
	exp.duration(runPodSandbox, p.ran(), nil)
	exp.duration(firstWrite, p.first.Sub(p.start), nil)
	errs := []error{exp.execs(ctx, p)}
	var m memory
	shim, err := runcShim(p.id)
	if err == nil {
		m, err = processMemory(shim)
	}
	exp.add(shimPrivate, m.private, err)
	return errors.Join(append(errs, err)...)
}

// miss is one pod of ours whose VM is restored while it waits.
func (r *report) miss(ctx context.Context, n *testnode.Node) (retErr error) {
	exp := r.expect(sideOurs, map[string]int{runPodSandbox + "/" + miss: 1, firstWrite + "/" + miss: 1})
	defer exp.settle()
	p, err := startPod(ctx, n, testnode.CloudHV)
	defer func() {
		_, err := p.remove(ctx)
		retErr = errors.Join(retErr, err)
	}()
	if err != nil {
		return err
	}
	info, err := p.info(ctx)
	if err != nil {
		return err
	}
	if info.Outcome != miss {
		return fmt.Errorf("the pod was a %s: %w", info.Outcome, errdefs.ErrUnknown)
	}
	exp.duration(runPodSandbox+"/"+miss, p.ran(), nil)
	exp.duration(firstWrite+"/"+miss, p.first.Sub(p.start), nil)
	r.keep(p, info)
	return nil
}

// keep notes the parts of a start.
func (r *report) keep(p *pod, info *podInfo) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.machine = info.machine()
	r.phases[info.Outcome] = append(r.phases[info.Outcome], info.Phases)
	r.calls[info.Outcome] = append(r.calls[info.Outcome], p.calls)
}

// removal ends a pod, which is measured unless the pod had failed before.
func (p *pending) removal(ctx context.Context, of *pod) error {
	took, err := of.remove(ctx)
	if of.first.IsZero() {
		return err
	}
	p.duration(stopRemove, took, err)
	return err
}

func (p *pending) execs(ctx context.Context, of *pod) error {
	var errs []error
	for range execs {
		took, err := of.execute(ctx)
		p.duration(execTrue, took, err)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// drainedWorkers start pods without a pause, each its own.
const drainedWorkers = 2

// drained measures pods that come faster than the pool can follow, and runc's that
// come in the same way. What found a VM ready all the same does not count as drained.
func (b *bench) drained(ctx context.Context, n *testnode.Node) error {
	for _, h := range b.inTurn(2) {
		if err := awaitPool(ctx, n, 1); err != nil {
			return err
		}
		began := time.Now()
		done, err := b.stream(ctx, n, h, b.rounds)
		b.complain("drained, "+h, err)
		b.report.add(podsPerSecond+"/"+drained, h, float64(done)/time.Since(began).Seconds(), nil)
		b.progress("drained: %s", h)
	}
	return ctx.Err()
}

// inTurn is each handler as often as said, the first one of a pair changing.
func (b *bench) inTurn(times int) []string {
	var hs []string
	for i := range times {
		hs = append(hs, handlers[i%2], handlers[(i+1)%2])
	}
	return hs
}

// stream runs count pods by workers that begin the next one when they have removed
// the last, and returns how many ran.
func (b *bench) stream(ctx context.Context, n *testnode.Node, h string, count int) (int, error) {
	var next, done atomic.Int64
	var wg sync.WaitGroup
	var mu sync.Mutex
	var errs []error
	for range drainedWorkers {
		wg.Go(func() {
			for ctx.Err() == nil && next.Add(1) <= int64(count) {
				err := b.streamed(ctx, n, h)
				if err == nil {
					done.Add(1)
					continue
				}
				mu.Lock()
				errs = append(errs, err)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return int(done.Load()), errors.Join(errs...)
}

func (b *bench) streamed(ctx context.Context, n *testnode.Node, h string) (retErr error) {
	p, err := startPod(ctx, n, h)
	defer func() {
		_, err := p.remove(ctx)
		retErr = errors.Join(retErr, err)
	}()
	name := firstWrite + "/" + drained
	if err != nil {
		b.report.add(name, h, 0, err)
		return err
	}
	if h == testnode.CloudHV {
		info, err := p.info(ctx)
		if err != nil {
			b.report.add(name, h, 0, err)
			return err
		}
		if info.Outcome == hit {
			return nil
		}
	}
	b.report.duration(name, h, p.first.Sub(p.start), nil)
	return nil
}
