// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// Names of what idle pods cost, each by N.
const (
	availablePerPod  = "available_bytes_per_pod"
	availableSpread  = "available_bytes_max_over_min"
	pssPerPod        = "pss_bytes_per_pod"
	vmmPSSPerPod     = "vmm_pss_bytes_per_pod"
	shimPSSPerPod    = "shim_pss_bytes_per_pod"
	residentPerPod   = "containerd_rss_bytes_per_pod"
	heapPerPod       = "containerd_heap_bytes_per_pod"
	goroutinesPerPod = "containerd_goroutines_per_pod"
	filesPerPod      = "containerd_fds_per_pod"
	idlePerPod       = "idle_cpu_cores_per_pod"
	vmmIdlePerPod    = "vmm_idle_cpu_cores_per_pod"
	shimIdlePerPod   = "shim_idle_cpu_cores_per_pod"
	ctrdIdlePerPod   = "containerd_idle_cpu_cores_per_pod"
)

// standing is how many VMs stand ready while pods are weighed: before there are
// any, and with all of them.
const standing = 4

// densities weighs idle pods of each handler.
func (b *bench) densities(ctx context.Context) (retErr error) {
	n, err := b.newNode(ctx, "bench", pool(standing, standing, map[string]any{"parallel": 2, "max_memory": "1TiB"}))
	if err != nil {
		return err
	}
	defer b.closeNode(ctx, n, &retErr)
	if err := awaitPool(ctx, n, standing); err != nil {
		return err
	}
	for _, h := range []string{sideRunC, sideOurs} {
		// What the first pod of a handler makes for all.
		b.complain("warming up", newReport().burst(ctx, n, h, 1, ""))
		if err := b.fill(ctx, n, h); err != nil {
			return err
		}
	}
	b.spread()
	return nil
}

// fill starts pods up to each number, and weighs them there.
func (b *bench) fill(ctx context.Context, n *testnode.Node, h string) (retErr error) {
	var pods []*pod
	defer func() { retErr = errors.Join(retErr, removeAll(ctx, pods)) }()
	empty, err := b.look(ctx, n, nil)
	if err != nil {
		return err
	}
	for _, count := range b.density {
		if fits, err := room(); err != nil || h == testnode.CloudHV && count-len(pods) > fits {
			b.report.note("density of %s at %d was left out: there is memory for %d VMs more than the %d that run", h, count, fits, len(pods))
			return err
		}
		more, err := b.startMany(ctx, n, h, count-len(pods))
		pods = append(pods, more...)
		if err != nil {
			return err
		}
		full, err := b.look(ctx, n, pods)
		if err != nil {
			return err
		}
		values := full.perPod(empty, count)
		for _, name := range slices.Sorted(maps.Keys(values)) {
			b.report.add(fmt.Sprintf("%s@%d", name, count), h, values[name], nil)
		}
		// The figure without a number is that of the most pods.
		if count == slices.Max(b.density) {
			b.report.add(idlePerPod, h, values[idlePerPod], nil)
		}
		b.progress("density: %d pods by %s", count, h)
	}
	return nil
}

// startMany starts pods two at a time; ours each take a VM that is ready.
func (b *bench) startMany(ctx context.Context, n *testnode.Node, h string, count int) ([]*pod, error) {
	pods, errs := make([]*pod, count), make([]error, count)
	const atOnce = 2
	for i := 0; i < count; i += atOnce {
		if h == testnode.CloudHV {
			if err := awaitPool(ctx, n, atOnce); err != nil {
				return slices.DeleteFunc(pods, func(p *pod) bool { return p == nil }), err
			}
		}
		var wg sync.WaitGroup
		for j := i; j < min(i+atOnce, count); j++ {
			wg.Go(func() { pods[j], errs[j] = startPod(ctx, n, h) })
		}
		wg.Wait()
		b.progress("density: %d of %d more pods by %s", i, count, h)
	}
	return pods, errors.Join(errs...)
}

// usage is what a node and its pods use.
type usage struct {
	// available is the host's memory.
	available float64
	// vmm, shim and other are the pods' shares of memory; other is runc's containers'.
	vmm, shim, other float64
	// vmmCPU, shimCPU, otherCPU and ctrdCPU are processors used, 1 for a whole one.
	vmmCPU, shimCPU, otherCPU, ctrdCPU float64
	// ctrd is containerd.
	ctrd testnode.Usage
}

// look watches a node for a while, once it has come to rest.
func (b *bench) look(ctx context.Context, n *testnode.Node, pods []*pod) (usage, error) {
	if err := awaitPool(ctx, n, standing); err != nil {
		return usage{}, err
	}
	var shims, vmms, others []int
	for _, p := range pods {
		shim, rest, err := p.processes(ctx)
		if err != nil {
			return usage{}, err
		}
		shims = append(shims, shim)
		if p.handler == testnode.CloudHV {
			vmms = append(vmms, rest...)
		} else {
			others = append(others, rest...)
		}
	}
	sleep(ctx, settleTime)
	u, err := b.busy(ctx, n, vmms, shims, others)
	if err != nil {
		return u, err
	}
	if u.ctrd, err = n.Usage(ctx); err != nil {
		return u, err
	}
	for _, part := range []struct {
		sum  *float64
		pids []int
	}{{&u.vmm, vmms}, {&u.shim, shims}, {&u.other, others}} {
		for _, pid := range part.pids {
			m, err := processMemory(pid)
			if err != nil {
				return u, err
			}
			*part.sum += m.pss
		}
	}
	u.available, err = memAvailable()
	return u, err
}

// busy measures how much of a processor each part uses.
func (b *bench) busy(ctx context.Context, n *testnode.Node, vmms, shims, others []int) (usage, error) {
	parts := [][]int{vmms, shims, others, {n.Pid()}}
	spent := func() (sums [4]time.Duration, err error) {
		for i, pids := range parts {
			for _, pid := range pids {
				t, err := processorTime(pid)
				if err != nil {
					return sums, err
				}
				sums[i] += t
			}
		}
		return sums, nil
	}
	began := time.Now()
	before, err := spent()
	if err != nil {
		return usage{}, err
	}
	sleep(ctx, b.idle)
	after, err := spent()
	if err != nil {
		return usage{}, err
	}
	took := time.Since(began).Seconds()
	rate := func(i int) float64 { return (after[i] - before[i]).Seconds() / took }
	return usage{vmmCPU: rate(0), shimCPU: rate(1), otherCPU: rate(2), ctrdCPU: rate(3)}, ctx.Err()
}

// perPod is what each of count pods adds to a node that was empty.
func (u usage) perPod(empty usage, count int) map[string]float64 {
	n := float64(count)
	ctrd := u.ctrdCPU - empty.ctrdCPU
	return map[string]float64{
		availablePerPod:  (empty.available - u.available) / n,
		pssPerPod:        (u.vmm + u.shim + u.other) / n,
		vmmPSSPerPod:     u.vmm / n,
		shimPSSPerPod:    u.shim / n,
		residentPerPod:   float64(u.ctrd.Resident-empty.ctrd.Resident) / n,
		heapPerPod:       float64(u.ctrd.Heap-empty.ctrd.Heap) / n,
		goroutinesPerPod: float64(u.ctrd.Goroutines-empty.ctrd.Goroutines) / n,
		filesPerPod:      float64(u.ctrd.Files-empty.ctrd.Files) / n,
		idlePerPod:       (u.vmmCPU + u.shimCPU + u.otherCPU + ctrd) / n,
		vmmIdlePerPod:    u.vmmCPU / n,
		shimIdlePerPod:   u.shimCPU / n,
		ctrdIdlePerPod:   ctrd / n,
	}
}

// spread adds how far apart the memory per pod is at the different numbers of pods.
func (b *bench) spread() {
	for _, side := range handlers {
		var values []float64
		for _, count := range b.density {
			if s := b.report.samples[key{fmt.Sprintf("%s@%d", availablePerPod, count), side}]; s != nil {
				values = append(values, s.values...)
			}
		}
		if len(values) > 1 && slices.Min(values) > 0 {
			b.report.add(availableSpread, side, slices.Max(values)/slices.Min(values), nil)
		}
	}
}
