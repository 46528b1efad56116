// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Command demo shows a pod in a virtual machine of its own: it starts a private
// containerd with our plugin, drives it by crictl, prints what happens and how
// long it took, and removes everything again. It needs root and what `make
// build` makes; $IMAGE adds a container of that image to the pod.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// cleanupLimit bounds the removal of everything at the end.
const cleanupLimit = 2 * time.Minute

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	err := run(ctx, newPrinter(os.Stdout), os.Getenv("IMAGE"))
	if ctx.Err() != nil {
		fmt.Fprintln(os.Stderr, "\ndemo: interrupted; everything it made is removed")
		os.Exit(130)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "\ndemo:", err)
		os.Exit(1)
	}
}

// run plays the demo and leaves nothing, however it ends.
func run(ctx context.Context, out *printer, image string) (retErr error) {
	opts := testnode.Options{Name: "demo"}
	missing, err := testnode.Missing(opts)
	if err != nil {
		return err
	}
	if len(missing) > 0 {
		return fmt.Errorf("not built yet: %v (make build)", missing)
	}
	node, err := testnode.New(opts)
	if err != nil {
		return err
	}
	closed := false
	closeNode := func() error {
		if closed {
			return nil
		}
		closed = true
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), testnode.Scale(cleanupLimit))
		defer cancel()
		return node.Close(ctx)
	}
	defer func() {
		if retErr != nil && ctx.Err() == nil {
			fmt.Fprintf(os.Stderr, "\nThe end of containerd's log:\n%s\n", node.LogTail(2048))
		}
		retErr = errors.Join(retErr, closeNode())
	}()

	d := &demo{node: node, out: out, extra: image}
	for _, step := range []func(context.Context) error{
		d.versions, d.start, d.images, d.pod, d.phases, d.inside, d.logs, d.http, d.extraContainer, d.memory,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return d.cleanUp(ctx, closeNode)
}
