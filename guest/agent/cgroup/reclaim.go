// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// reclaimTries is how often the kernel is asked: what has to be written to a disk
	// first is reclaimed when it has been.
	reclaimTries = 20
	reclaimPause = 50 * time.Millisecond
)

// Reclaim has the kernel take back memory of g, its page cache for one, until it
// uses no more than limit bytes; 0 or less is no limit. If it uses more it is an
// ErrFailedPrecondition.
func (g Group) Reclaim(ctx context.Context, limit int64) error {
	if limit <= 0 {
		return nil
	}
	for try := 1; ; try++ {
		used, err := g.number("memory.current")
		if err != nil || used <= uint64(limit) {
			return err
		}
		err = g.write("memory.reclaim", strconv.FormatUint(used-uint64(limit), 10))
		if err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if used, err = g.number("memory.current"); err != nil || used <= uint64(limit) {
			return err
		}
		if try == reclaimTries {
			return fmt.Errorf("%d bytes are in use, and cannot be reclaimed to %d: %w", used, limit, errdefs.ErrFailedPrecondition)
		}
		timer := time.NewTimer(reclaimPause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return context.Cause(ctx)
		}
	}
}
