// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"

	"github.com/containerd/platforms"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Platform is Linux on the host's architecture, for every sandbox.
func (c *Controller) Platform(_ context.Context, id string) (imagespec.Platform, error) {
	if _, err := c.get(id); err != nil {
		return imagespec.Platform{}, err
	}
	return platforms.DefaultSpec(), nil
}
