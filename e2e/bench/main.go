// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Command bench starts pods by our handler and by runc in turn, on one private
// containerd in one run, and compares them. Absolute values say as much about
// the host as about us; the ratio is what counts.
//
// What is measured, by the host's clock:
//
//   - run_pod_sandbox: the call RunPodSandbox.
//   - first_write: from that call to the arrival of the container's first line in
//     its log. The time is the one that containerd stamps on the line, as a
//     guest's clock is not the host's; the way from the guest is charged to us.
//   - exec: the call ExecSync of a program that does nothing.
//   - stop_remove: the calls StopPodSandbox and RemovePodSandbox.
//   - vmm_private_bytes, shim_private_bytes: memory that is the process's alone
//     (Private_Clean and Private_Dirty), with the container idle. runc has no VMM.
//
// What fails, and what could not be tried because of it, is counted as failed.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

func main() {
	out := flag.String("o", "build/bench.json", "where to write the results as JSON")
	rounds := flag.Int("n", 20, "pods by each handler")
	warmUp := flag.Int("warm-up", 2, "pods by each handler that do not count")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *out, *rounds, *warmUp); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		stop()
		os.Exit(1)
	}
}

// handlers are run in turn; which goes first changes from round to round.
var handlers = [2]string{testnode.CloudHV, testnode.RunC}

func run(ctx context.Context, out string, rounds, warmUp int) (retErr error) {
	n, err := testnode.New(testnode.Options{Name: "bench", BinDir: os.Getenv("E2E_BIN"), GuestDir: os.Getenv("E2E_GUEST")})
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), testnode.Scale(2*time.Minute))
		defer cancel()
		retErr = errors.Join(retErr, n.Close(ctx))
	}()
	if err := n.Start(ctx); err != nil {
		return err
	}
	img, err := testimage.Busybox()
	if err != nil {
		return err
	}
	if err := n.Import(ctx, testimage.BusyboxRef, img); err != nil {
		return err
	}
	b := &bench{node: n, samples: map[string]*sample{}}
	for i := range warmUp + rounds {
		if i == warmUp {
			b.reset()
		}
		for j := range handlers {
			h := handlers[(i+j)%2]
			if err := b.round(ctx, h); err != nil {
				fmt.Fprintf(os.Stderr, "\nround %d, %s: %v\n", i-warmUp, h, err)
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
		}
		fmt.Fprintf(os.Stderr, "\r%d of %d rounds", i+1, warmUp+rounds)
	}
	fmt.Fprintln(os.Stderr)
	results := b.results()
	printResults(os.Stdout, results)
	b.printPhases(os.Stdout)
	data, err := json.MarshalIndent(results, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(out, append(data, '\n'), 0o644); err != nil {
		return fmt.Errorf("writing the results: %w", err)
	}
	if failed := b.failed(); failed > 0 {
		return fmt.Errorf("%d measurements failed", failed)
	}
	return nil
}
