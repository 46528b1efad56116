// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"

	"github.com/containerd/errdefs"
)

// Shutdown stops the sandbox and removes all that it has on the host, its
// record last. An unknown sandbox has been removed already.
func (c *Controller) Shutdown(ctx context.Context, id string) error {
	ctx = withPod(ctx, id)
	p, err := c.get(id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := c.stop(ctx, p); err != nil {
		return err
	}
	return c.remove(ctx, p)
}
