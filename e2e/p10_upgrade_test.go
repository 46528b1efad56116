// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// TestUpgrade replaces the binaries and the guest's image of the commit before this one
// (hack/previous.sh) by this one's, as a package manager does, while pods run: what lives goes on, and new
// pods are of the new build. Then the other way round, as an operator who is not content.
func TestUpgrade(t *testing.T) {
	n := node(t)
	old := filepath.Join(n.Repo(), "build", "previous")
	if _, err := os.Stat(filepath.Join(old, "stamp")); err != nil {
		t.Skip("there is no build of the commit before this one: hack/previous.sh")
	}
	t.Run("up", func(t *testing.T) {
		upgrade(t, old, filepath.Join(n.Repo(), "build"))
	})
	t.Run("down", func(t *testing.T) {
		upgrade(t, filepath.Join(n.Repo(), "build"), old)
	})
}

// upgrade is that from the build in one directory to that in another.
func upgrade(t *testing.T, from, to string) {
	installed := openDir(t) // a confined VMM opens the kernel and the image by their paths
	install := func(build string) error {
		for name, dir := range map[string]string{"bin": filepath.Join(build, "bin"), "guest": filepath.Join(build, "guest")} {
			link := filepath.Join(installed, name)
			if err := errors.Join(os.Symlink(dir, link+".new"), os.Rename(link+".new", link)); err != nil {
				return err
			}
		}
		return nil
	}
	require.NoError(t, install(from))
	address, err := testnode.FreeAddress()
	require.NoError(t, err)
	n := ownNode(t, map[string]any{"pool": map[string]any{"min": 1, "max": 2}}, func(o *testnode.Options) {
		o.BinDir, o.GuestDir = filepath.Join(installed, "bin"), filepath.Join(installed, "guest")
		o.Metrics = address
	})
	img, err := testimage.Helper(suite.helper)
	require.NoError(t, err)
	require.NoError(t, n.Import(testContext(t), testimage.HelperRef, img))
	require.NoError(t, n.AwaitPool(testContext(t), 1))

	p := podBy(t, n, testnode.CloudHV)
	before := p.info().GuestAgent
	restart(p, func(ctx context.Context) error { return errors.Join(n.Stop(ctx), install(to)) })
	require.Equal(t, before, p.info().GuestAgent, "what lives stays what it was")
	require.NoError(t, n.AwaitPool(testContext(t), 1))
	require.NotEqual(t, before, podBy(t, n, testnode.CloudHV).info().GuestAgent, "new VMs are of the new build")
}
