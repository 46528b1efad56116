// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testnode

import (
	"context"
	"fmt"
	"time"
)

// Eventually calls check until it succeeds or ctx ends, and returns the last
// error then. It is for what no event tells; the pause between calls doubles
// from 10 ms to half a second.
func Eventually(ctx context.Context, check func(context.Context) error) error {
	pause := 10 * time.Millisecond
	var last error
	for {
		err := check(ctx)
		if err == nil {
			return nil
		}
		// The end of ctx says nothing about what was awaited.
		if last == nil || ctx.Err() == nil {
			last = err
		}
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			t.Stop()
			return fmt.Errorf("%w: %w", context.Cause(ctx), last)
		case <-t.C:
		}
		pause = min(2*pause, 500*time.Millisecond)
	}
}
