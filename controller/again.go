// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

const (
	// firstAgain is the pause before something that has failed is tried again, which
	// doubles up to longestAgain.
	firstAgain   = 500 * time.Millisecond
	longestAgain = time.Minute
	// tries and tryPause are for what cannot wait: most failures of a moment are over then.
	tries    = 3
	tryPause = 20 * time.Millisecond
)

// keepTrying does in the background what has failed and nobody else will do again, until it
// succeeds or the controller is closed. Each attempt has limit.
func (c *Controller) keepTrying(ctx context.Context, what string, limit time.Duration, do func(context.Context) error) {
	c.tryLater(untraced(ctx), what, limit, firstAgain, do)
}

func (c *Controller) tryLater(ctx context.Context, what string, limit, pause time.Duration, do func(context.Context) error) {
	// No goroutine waits: it may take as long as the node runs.
	time.AfterFunc(pause, func() {
		if c.closed.Load() {
			return
		}
		within, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		if err := do(within); err != nil {
			log.G(ctx).WithError(err).WithField("pause", pause).WithField("what", what).Error("a step has failed, and is tried again")
			c.tryLater(ctx, what, limit, min(2*pause, longestAgain), do)
			return
		}
		log.G(ctx).WithField("what", what).Info("a step that had failed has succeeded")
	})
}

// tryAtOnce does something that others wait for up to three times, as long as it fails for
// a reason that may be one of the moment.
func tryAtOnce(ctx context.Context, what string, do func() error) error {
	for n := 1; ; n++ {
		err := do()
		if err == nil || n == tries || isFinal(err) {
			return err
		}
		log.G(ctx).WithError(err).WithField("what", what).Warn("a step has failed, and is tried again at once")
		time.Sleep(tryPause)
	}
}

// isFinal is true for errors that the same attempt would have again.
func isFinal(err error) bool {
	return errdefs.IsNotFound(err) || errdefs.IsDataLoss(err) || errdefs.IsInvalidArgument(err) || errdefs.IsNotImplemented(err) ||
		isContextError(err)
}
