// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/controller/config"
	"github.com/cloudhv/containerd-cloudhv/controller/prebuild"
)

// noEvents is a source of events without any.
type noEvents struct{}

func (noEvents) Subscribe(context.Context, ...string) (<-chan *events.Envelope, <-chan error) {
	return nil, nil
}

// noImages is an image store without images.
type noImages struct{ images.Store }

func (noImages) Get(context.Context, string) (images.Image, error) {
	return images.Image{}, errdefs.ErrNotFound
}

// What a pod runs is noted, by all policies but one; Close ends the noting, which
// is seen by what is left running after the tests.
func TestWhatAPodRunsIsNoted(t *testing.T) {
	for _, policy := range []string{config.PrebuildUsed, config.PrebuildAlways, config.PrebuildNever} {
		t.Run(policy, func(t *testing.T) {
			n := newNode(t)
			n.cfg.Prebuild = policy
			n.OpenPrebuild(n.ctx(), prebuild.Config{Events: noEvents{}, Images: noImages{}})
			n.containers.sandbox["c1"] = "a"
			n.run("a")
			_, err := n.attachRootFS(n.ctx(), "a", "c1")
			require.NoError(t, err)
			memory := filepath.Join(n.cfg.CacheDir, "prebuild", "memory.json")
			if policy == config.PrebuildNever {
				require.NoDirExists(t, filepath.Dir(memory))
			} else {
				require.Eventually(t, func() bool {
					b, err := os.ReadFile(memory)
					return err == nil && strings.Contains(string(b), `"r/c1"`)
				}, 10*time.Second, time.Millisecond)
			}
			require.NoError(t, n.Close())
		})
	}
}

// An unfit controller, whose directories may be another's, does nothing.
func TestUnfitNotesNothing(t *testing.T) {
	n := newNode(t)
	n.cfg.Prebuild = config.PrebuildAlways
	n.Controller.unfit = errdefs.ErrFailedPrecondition
	n.OpenPrebuild(n.ctx(), prebuild.Config{Events: noEvents{}, Images: noImages{}})
	require.NoError(t, n.Close())
	require.NoDirExists(t, filepath.Join(n.cfg.CacheDir, "prebuild"))
}
