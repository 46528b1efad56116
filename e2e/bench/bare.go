// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

const (
	// weighed is how many VMs are weighed at a time: they share the snapshot's pages.
	weighed = 4
	// settleTime is left to what has just started, before it is weighed.
	settleTime = 2 * time.Second
)

// bare compares with the hypervisor alone: how long a restore takes, and what a
// restored VM weighs.
func (b *bench) bare(ctx context.Context) error {
	if err := b.restores(ctx); err != nil {
		return err
	}
	if err := b.weigh(ctx, vmPSS, pool(weighed, weighed, nil)); err != nil {
		return err
	}
	return b.weigh(ctx, vmPSS+"/not_warmed", pool(weighed, weighed, map[string]any{"warm_up": "never"}))
}

// restores compares pods of ours for which a VM is restored with bare restores.
func (b *bench) restores(ctx context.Context) (retErr error) {
	n, err := b.newNode(ctx, "benchm", poolOff)
	if err != nil {
		return err
	}
	defer b.closeNode(ctx, n, &retErr)
	var t *template
	defer func() { retErr = errors.Join(retErr, t.remove()) }()
	for i := range b.warmUp + b.rounds {
		r := b.report
		if i < b.warmUp {
			r = newReport() // it does not count
		}
		ours := func() error { return r.restoreOurs(ctx, n, &t) }
		theirs := func() error { return r.restoreBare(ctx, t) }
		turns := []func() error{ours, theirs}
		if i%2 == 1 {
			slices.Reverse(turns)
		}
		for _, turn := range turns {
			b.complain(fmt.Sprintf("restore %d", i), turn())
			if ctx.Err() != nil {
				return ctx.Err()
			}
		}
		b.progress("restores: %d of %d rounds", i+1, b.warmUp+b.rounds)
	}
	return nil
}

// restoreOurs is a pod whose VM is restored; the first one shows the template.
func (r *report) restoreOurs(ctx context.Context, n *testnode.Node, t **template) (retErr error) {
	exp := r.expect(sideOurs, map[string]int{restoreToAnswer: 1})
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
	took, ok := answered(info.Phases)
	if info.Outcome != miss || !ok {
		return fmt.Errorf("the pod was a %s: %w", info.Outcome, errdefs.ErrUnknown)
	}
	exp.duration(restoreToAnswer, took, nil)
	if *t == nil {
		*t, err = copyTemplate(info.VMMPid)
	}
	return err
}

func (r *report) restoreBare(ctx context.Context, t *template) error {
	exp := r.expect(sideBare, map[string]int{restoreToAnswer: 1})
	defer exp.settle()
	vm, took, err := t.restore(ctx)
	if err != nil {
		return err
	}
	exp.duration(restoreToAnswer, took, nil)
	return vm.end()
}

// weigh compares VMs that are ready in a pool with as many that were restored bare.
func (b *bench) weigh(ctx context.Context, name string, cfg map[string]any) (retErr error) {
	n, err := b.newNode(ctx, "bench", cfg)
	if err != nil {
		return err
	}
	defer b.closeNode(ctx, n, &retErr)
	if err := awaitPool(ctx, n, weighed); err != nil {
		return err
	}
	ours, err := vmms(n)
	if err != nil {
		return err
	}
	if len(ours) != weighed {
		return fmt.Errorf("%d VMMs run and not %d: %w", len(ours), weighed, errdefs.ErrUnknown)
	}
	t, err := copyTemplate(ours[0])
	if err != nil {
		return err
	}
	defer func() { retErr = errors.Join(retErr, t.remove()) }()
	var theirs []int
	for range weighed {
		vm, _, err := t.restore(ctx)
		if err != nil {
			return err
		}
		defer func() { retErr = errors.Join(retErr, vm.end()) }()
		theirs = append(theirs, vm.cmd.Process.Pid)
	}
	sleep(ctx, settleTime)
	for side, pids := range map[string][]int{sideOurs: ours, sideBare: theirs} {
		for _, pid := range pids {
			m, err := processMemory(pid)
			b.add(name, side, m.pss, err)
		}
	}
	b.progress("weighed: %s", name)
	return ctx.Err()
}

// vmms are the pids of a node's VMMs, which name its directory.
func vmms(n *testnode.Node) ([]int, error) {
	lines, err := commandLines()
	if err != nil {
		return nil, err
	}
	var pids []int
	for pid, args := range lines {
		isVMM := isCloudHypervisor(args[0]) || strings.HasPrefix(filepath.Base(args[0]), "qemu-system")
		if isVMM && strings.Contains(strings.Join(args, " "), n.Dir()+"/") {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return pids, nil
}

// sleep waits, unless ctx ends before.
func sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// replaceArg replaces the value of key=value within a list of options separated by
// commas, in whichever argument after has it; it tells what was there.
func replaceArg(args []string, after, key, value string) (old string, _ error) {
	for i, arg := range args {
		if !strings.Contains(arg, after) {
			continue
		}
		options := strings.Split(arg, ",")
		for j, o := range options {
			if v, ok := strings.CutPrefix(o, key+"="); ok {
				options[j] = key + "=" + value
				args[i] = strings.Join(options, ",")
				return v, nil
			}
		}
	}
	return "", fmt.Errorf("the VMM's command line has no %s in %s: %w", key, after, errdefs.ErrNotFound)
}

// benchDir is where bare VMs have their files: on the disk that nodes use too.
func benchDir() (string, error) {
	if err := os.MkdirAll(testnode.BaseDir, 0o711); err != nil {
		return "", err
	}
	return os.MkdirTemp(testnode.BaseDir, "bare")
}
