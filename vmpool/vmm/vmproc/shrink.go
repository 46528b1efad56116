// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmproc

import (
	"context"
	"math"
	"time"
)

const (
	// ShrinkLimit is how long AwaitShrink waits for a guest that gives no more memory back.
	ShrinkLimit = 3 * time.Second
	// shrinkPause is how often it looks: what tells comes late, or not at all.
	shrinkPause = 100 * time.Millisecond
)

// AwaitShrink waits until the guest has no more than so many bytes, for ShrinkLimit after
// each progress, and returns how many it has: size asks for that. hurry has a guest try
// again that makes no progress.
func AwaitShrink(ctx context.Context, want int64, size func(context.Context) (int64, error), hurry func(context.Context) error) (int64, error) {
	look := time.NewTicker(shrinkPause)
	defer look.Stop()
	end := time.NewTimer(ShrinkLimit)
	defer end.Stop()
	for before := int64(math.MaxInt64); ; {
		has, err := size(ctx)
		if err != nil {
			return 0, err
		}
		if has <= want {
			return has, nil
		}
		// While it makes progress it is left alone: it would begin anew.
		if has < before {
			end.Reset(ShrinkLimit)
		} else if err := hurry(ctx); err != nil {
			return 0, err
		}
		before = has
		select {
		case <-look.C:
		case <-end.C:
			return has, nil
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}
