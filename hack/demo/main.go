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

// cleanupLimit bounds the removal of everything at the end, settleLimit how long
// it may take until all of it is seen to be gone.
const (
	cleanupLimit = 2 * time.Minute
	settleLimit  = 10 * time.Second
)

// errInterrupted is what an interrupted demo returns that has left nothing.
var errInterrupted = errors.New("interrupted; everything it made is removed")

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	err := run(ctx, newPrinter(os.Stdout), os.Getenv("IMAGE"))
	if err != nil {
		fmt.Fprintln(os.Stderr, "\ndemo:", err)
		stop()
		if errors.Is(err, errInterrupted) {
			os.Exit(130)
		}
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
	d := &demo{out: out, extra: image, site: newSite(opts.Name)}
	if d.first, err = d.site.look(nil); err != nil {
		return err
	}
	if d.node, err = testnode.New(opts); err != nil {
		return err
	}
	defer func() {
		if retErr != nil && ctx.Err() == nil {
			fmt.Fprintf(os.Stderr, "\nThe end of containerd's log:\n%s\n", d.node.LogTail(2048))
		}
		err := d.close(ctx)
		if ctx.Err() != nil && err == nil {
			retErr = errInterrupted
			return
		}
		retErr = errors.Join(retErr, err)
	}()
	for _, step := range []func(context.Context) error{
		d.versions, d.start, d.images, d.pool, d.pod, d.phases, d.inside, d.logs, d.http, d.extraContainer, d.memory, d.cleanUp,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}
