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
// ErrFailedPrecondition. What can be taken back is known before: the kernel would
// search all the rest in vain, and for long.
func (g Group) Reclaim(ctx context.Context, limit int64) error {
	if limit <= 0 {
		return nil
	}
	for try := 0; ; try++ {
		used, err := g.number("memory.current")
		if err != nil || used <= uint64(limit) {
			return err
		}
		stat, err := g.flat("memory.stat")
		if err != nil {
			return err
		}
		// A guest has no swap.
		spare := stat["inactive_file"] + stat["active_file"] + stat["slab_reclaimable"]
		if try == reclaimTries || used > uint64(limit)+spare {
			return fmt.Errorf("%d bytes are in use, and cannot be reclaimed to %d: %w", used, limit, errdefs.ErrFailedPrecondition)
		}
		err = g.write("memory.reclaim", strconv.FormatUint(used-uint64(limit), 10))
		if err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err == nil {
			continue
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
