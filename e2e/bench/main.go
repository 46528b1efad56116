// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Command bench starts pods by our handler and by runc in turn, on one private
// containerd in one run, and compares them. Absolute values say as much about
// the host as about us; the ratio is what counts. docs/performance.md explains each
// figure for its readers.
//
// It has four sections, each with nodes of its own:
//
//   - start: pods one after the other. /hit found a VM ready, /miss had one restored
//     from a second node that keeps none, /drained was restored while two workers
//     start pods without a pause and the pool of two cannot follow.
//   - concurrency: N pods at the same moment (@N), with N VMs ready.
//   - density: N pods that do nothing (@N), what they cost the host, and what
//     containerd grows by.
//   - bare: the hypervisor alone, with the same arguments, restored from a copy of the
//     same snapshot by the shortest way there is.
//
// What is measured, by the host's clock:
//
//   - run_pod_sandbox: the call RunPodSandbox.
//   - first_write: from that call to the arrival of the container's first line in
//     its log. The time is the one that containerd stamps on the line, as a
//     guest's clock is not the host's; the way from the guest is charged to us.
//   - create_start_own: our own share of Create and Start, which is the time from
//     the call of each to its return, without the time in which nothing but the guest's
//     answer was waited for: whether it lives, and its configuration. What goes on
//     beside the configuration (the shim's start, the network's) counts as far as it
//     lasts longer. What the VMM and the host's kernel take counts as ours.
//   - exec: the call ExecSync of a program that does nothing.
//   - stop_remove: the calls StopPodSandbox and RemovePodSandbox.
//   - pods_per_second: pods that got to their first line (a burst), or through their
//     whole life (drained).
//   - restore_to_answer: from the first step of a restore, the copy of the disk, to the
//     first answer of the guest's agent.
//   - vmm_private_bytes, shim_private_bytes: memory that is the process's alone
//     (Private_Clean and Private_Dirty), with the container idle. runc has no VMM.
//   - vm_pss_bytes: the VMM's proportional share (Pss) of a VM that is ready in the
//     pool, and of one that was restored bare and has answered, as many of each at a
//     time; /not_warmed with a pool that does not warm its VMs up.
//   - *_per_pod@N: the difference to the node without pods, by N.
//
// State directories are on a tmpfs, as they are in /run; all else is on the disk of
// the nodes' directories.
//
// What fails, and what could not be tried because of it, is counted as failed.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// sections are what there is to measure, in this order.
var sections = []string{"start", "concurrency", "bare", "io", "density"}

// bench is a run.
type bench struct {
	*report
	rounds, warmUp, bursts int
	levels, density        []int
	idle                   time.Duration
}

func main() {
	b := &bench{report: newReport()}
	out := flag.String("o", "build/bench.json", "where to write the results as JSON")
	which := flag.String("sections", strings.Join(sections, ","), "what to measure")
	flag.IntVar(&b.rounds, "n", 20, "pods by each handler")
	flag.IntVar(&b.warmUp, "warm-up", 2, "pods by each handler that do not count")
	flag.IntVar(&b.bursts, "bursts", 2, "bursts of the greatest concurrency, by each handler")
	levels := flag.String("concurrency", "1,10,50", "how many pods start at the same moment")
	density := flag.String("density", "10,50,150", "how many idle pods to weigh, ascending")
	flag.DurationVar(&b.idle, "idle", 20*time.Second, "over which time idle pods are watched")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	var err1, err2 error
	b.levels, err1 = numbers(*levels)
	b.density, err2 = numbers(*density)
	err := errors.Join(err1, err2)
	if err == nil {
		err = b.run(ctx, strings.Split(*which, ","), *out)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		stop()
		os.Exit(1)
	}
}

// numbers reads a list such as "1,10,50".
func numbers(list string) ([]int, error) {
	var ns []int
	for word := range strings.SplitSeq(list, ",") {
		n, err := strconv.Atoi(word)
		if err != nil || n < 1 {
			return nil, fmt.Errorf("%q in %q is no number above 0: %w", word, list, errdefs.ErrInvalidArgument)
		}
		ns = append(ns, n)
	}
	return ns, nil
}

// handlers are run in turn; which goes first changes.
var handlers = [2]string{sideOurs, sideRunC}

func (b *bench) run(ctx context.Context, which []string, out string) error {
	for _, s := range which {
		if !slices.Contains(sections, s) {
			return fmt.Errorf("there is no section %q, only %v: %w", s, sections, errdefs.ErrInvalidArgument)
		}
	}
	do := map[string]func(context.Context) error{"start": b.starts, "concurrency": b.concurrency, "bare": b.bare, "io": b.io, "density": b.densities}
	var errs []error
	for _, s := range sections {
		if slices.Contains(which, s) && ctx.Err() == nil {
			if err := do[s](ctx); err != nil {
				// The other sections say what they can.
				errs = append(errs, fmt.Errorf("section %s: %w", s, err))
			}
			fmt.Fprintln(os.Stderr)
		}
	}
	results := b.results()
	printResults(os.Stdout, results)
	b.printPhases(os.Stdout)
	for _, n := range b.notes {
		fmt.Println("note:", n)
	}
	data, err := json.MarshalIndent(results, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(out, append(data, '\n'), 0o644); err != nil {
		return fmt.Errorf("writing the results: %w", err)
	}
	if failed := b.failed(); failed > 0 {
		errs = append(errs, fmt.Errorf("%d measurements failed: %w", failed, errdefs.ErrUnknown))
	}
	return errors.Join(append(errs, ctx.Err())...)
}

// progress tells how far it is, in place.
func (b *bench) progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "\r\x1b[K"+format, args...)
}

// complain tells of a failure that has been counted.
func (b *bench) complain(what string, err error) {
	if err != nil {
		fmt.Fprintf(os.Stderr, "\n%s: %v\n", what, err)
	}
}

// pool is a plugin's configuration with so many VMs ready, and what else is said
// about the pool.
func pool(least, most int, more map[string]any) map[string]any {
	p := map[string]any{"min": least, "max": most}
	maps.Copy(p, more)
	return map[string]any{"pool": p}
}

// poolOff keeps none ready.
var poolOff = pool(0, 0, nil)

// newNode starts a node that has the image.
func (b *bench) newNode(ctx context.Context, name string, cfg map[string]any) (_ *testnode.Node, retErr error) {
	address, err := testnode.FreeAddress()
	if err != nil {
		return nil, err
	}
	b.progress("starting node %s", name)
	n, err := testnode.New(testnode.Options{
		Name: name, BinDir: os.Getenv("E2E_BIN"), GuestDir: os.Getenv("E2E_GUEST"), CloudHV: cfg, Metrics: address,
		Tmpfs: map[string]string{"state": "", "run": ""},
	})
	if err != nil {
		return nil, err
	}
	defer func() {
		if retErr != nil {
			b.closeNode(ctx, n, &retErr)
		}
	}()
	if err := n.Start(ctx); err != nil {
		return nil, err
	}
	img, err := testimage.Busybox()
	if err != nil {
		return nil, err
	}
	if err := n.Import(ctx, testimage.BusyboxRef, img); err != nil {
		return nil, err
	}
	return n, awaitSnapshot(ctx, n)
}

// awaitSnapshot waits until VMs can be restored.
func awaitSnapshot(ctx context.Context, n *testnode.Node) error {
	ctx, cancel := context.WithTimeout(ctx, testnode.Scale(5*time.Minute))
	defer cancel()
	return n.AwaitSnapshot(ctx)
}

// closeNode removes a node and all that it has.
func (b *bench) closeNode(ctx context.Context, n *testnode.Node, err *error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), testnode.Scale(5*time.Minute))
	defer cancel()
	*err = errors.Join(*err, n.Close(ctx))
}
