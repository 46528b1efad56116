// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// readyBytes is what a ready VM may cost the host, at the most, in bytes: as many are
// made ready as there is memory for.
const readyBytes = 192 << 20

// reserveBytes are never touched: the host's other processes live on them.
const reserveBytes = 2 << 30

// room says how many VMs the host has memory for now.
func room() (int, error) {
	free, err := memAvailable()
	return max(0, int((free-reserveBytes)/readyBytes)), err
}

// concurrency measures pods that are started at the same moment, of ours with a VM
// ready for each.
func (b *bench) concurrency(ctx context.Context) (retErr error) {
	most := slices.Max(b.levels)
	fits, err := room()
	if err != nil {
		return err
	}
	// As many again are being made ready while a burst's pods run.
	if 2*most > fits {
		b.report.note("concurrency above %d was left out: there is memory for %d VMs", fits/2, fits)
		most = fits / 2
	}
	n, err := b.newNode(ctx, "bench", pool(most, most, map[string]any{"parallel": 2, "max_memory": "1TiB"}))
	if err != nil {
		return err
	}
	defer b.closeNode(ctx, n, &retErr)
	if err := awaitPool(ctx, n, 1); err != nil {
		return err
	}
	for _, h := range handlers {
		b.complain("warming up", newReport().burst(ctx, n, h, 1, ""))
	}
	for _, level := range b.levels {
		if level > most {
			continue
		}
		// As many pods of each level, within reason.
		times := max(b.bursts, min(b.rounds, b.bursts*most/2/level))
		for i, h := range b.inTurn(times) {
			if err := awaitPool(ctx, n, most); err != nil {
				return err
			}
			b.complain(fmt.Sprintf("%d at once, %s", level, h), b.report.burst(ctx, n, h, level, fmt.Sprintf("@%d", level)))
			if ctx.Err() != nil {
				return ctx.Err()
			}
			b.progress("%d at once: %d of %d bursts", level, i+1, 2*times)
		}
		b.report.tails(fmt.Sprintf("%s/%s@%d", tail, hit, level), fmt.Sprintf("%s/%s@%d", firstWrite, hit, level))
	}
	return nil
}

// burst starts pods at the same moment, and removes them when the last one runs.
func (r *report) burst(ctx context.Context, n *testnode.Node, h string, count int, suffix string) error {
	name, run := firstWrite+suffix, runPodSandbox+suffix
	if h == testnode.CloudHV {
		name, run = firstWrite+"/"+hit+suffix, runPodSandbox+"/"+hit+suffix
	}
	pods, errs := make([]*pod, count), make([]error, count)
	var wg sync.WaitGroup
	for i := range count {
		wg.Go(func() {
			p, err := startPod(ctx, n, h)
			pods[i] = p
			if err == nil && h == testnode.CloudHV {
				err = p.mustBe(ctx, hit)
			}
			errs[i] = err
			r.duration(name, h, p.first.Sub(p.start), err)
			if err == nil {
				r.duration(run, h, p.ran(), nil)
			}
		})
	}
	began := time.Now()
	wg.Wait()
	last := began
	for _, p := range pods {
		if p.first.After(last) {
			last = p.first
		}
	}
	rate := podsPerSecond + suffix
	if h == testnode.CloudHV {
		rate = podsPerSecond + "/" + hit + suffix
	}
	if err := errors.Join(errs...); err == nil {
		r.add(rate, h, float64(count)/last.Sub(began).Seconds(), nil)
	}
	return errors.Join(append(errs, removeAll(ctx, pods))...)
}

// mustBe fails unless one of our pods came by its VM as said.
func (p *pod) mustBe(ctx context.Context, outcome string) error {
	info, err := p.info(ctx)
	if err == nil && info.Outcome != outcome {
		err = fmt.Errorf("the pod was a %s, not a %s: %w", info.Outcome, outcome, errdefs.ErrUnknown)
	}
	return err
}

// removers is how many pods are removed at a time.
const removers = 4

// removeAll ends pods, none of which is measured any more.
func removeAll(ctx context.Context, pods []*pod) error {
	ctx = context.WithoutCancel(ctx)
	var wg sync.WaitGroup
	errs, next := make([]error, len(pods)), make(chan int)
	for range removers {
		wg.Go(func() {
			for i := range next {
				_, errs[i] = pods[i].remove(ctx)
			}
		})
	}
	for i := range pods {
		next <- i
	}
	close(next)
	wg.Wait()
	return errors.Join(errs...)
}
