// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Command soak runs pods by our handler on a private containerd for a long time: one
// after the other, and then some at a time that come and go. No pod may fail, and
// nothing may be left of them: whenever no pod runs the census of the node
// (processes, mounts, links, files, records, containerd's goroutines and open files)
// has to be what it was after the first few pods, and memory and directories must
// not have grown beyond a bound.
package main

import (
	"context"
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
	s := &soak{out: os.Stdout}
	flag.IntVar(&s.pods, "pods", 1000, "how many pods run one after the other")
	flag.DurationVar(&s.churn, "churn", 30*time.Minute, "for how long pods come and go")
	flag.IntVar(&s.alive, "alive", 10, "how many there are at a time meanwhile")
	flag.IntVar(&s.warmUp, "warm-up", 40, "pods that run before anything is compared")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, s); err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		stop()
		os.Exit(1)
	}
}

// ready is how many VMs the pool has, always: so the census at rest is always the same.
const ready = 4

func run(ctx context.Context, s *soak) (retErr error) {
	address, err := testnode.FreeAddress()
	if err != nil {
		return err
	}
	n, err := testnode.New(testnode.Options{
		Name: "soak", BinDir: os.Getenv("E2E_BIN"), GuestDir: os.Getenv("E2E_GUEST"), Metrics: address, Tmpfs: map[string]string{"state": "", "run": ""},
		CloudHV: map[string]any{"pool": map[string]any{"min": ready, "max": ready}},
	})
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), testnode.Scale(5*time.Minute))
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
	s.node = n
	return s.run(ctx)
}
