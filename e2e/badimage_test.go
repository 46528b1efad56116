// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// TestBadImages imports images whose layers are broken, which containerd does not take,
// and such whose paths lead out of their root file system: what they have stays within,
// for both handlers in the same place, and nothing of the host's is seen or made.
func TestBadImages(t *testing.T) {
	n := poolNode(t, map[string]any{"min": 0, "max": 0})
	secret := filepath.Join(t.TempDir(), "secret")
	require.NoError(t, os.WriteFile(secret, []byte("of the host"), 0o644))
	for name, layer := range testimage.BrokenLayers() {
		img, err := testimage.WithLayer(suite.helper, layer)
		require.NoError(t, err)
		require.Error(t, n.Import(testContext(t), "localhost/chv/broken-"+name+":latest", img), name)
	}
	layer, err := testimage.EscapingLayer(secret)
	require.NoError(t, err)
	img, err := testimage.WithLayer(suite.helper, layer)
	require.NoError(t, err)
	const ref = "localhost/chv/escaping:latest"
	require.NoError(t, n.Import(testContext(t), ref, img))
	seen := map[string]string{}
	for _, h := range []string{testnode.RunC, testnode.CloudHV} {
		p := podBy(t, n, h)
		c := testnode.ContainerConfig("c", ref, "/bin/sh", "-c", `cat /climbed /in-link/file 2>/dev/null; cat /to-host 2>/dev/null; ls /outside-of-image 2>/dev/null; echo end`)
		ran := p.start(c)
		assert.Zero(t, ran.awaitExit().GetExitCode())
		seen[h] = ran.text("stdout")
		assert.NotContains(t, seen[h], "of the host")
		// A working directory that is a link to nowhere: runc does not make it, crun does, within.
		c = testnode.ContainerConfig("d", ref, "/bin/sh", "-c", "touch here")
		c.WorkingDir = "/work-link"
		if err := p.n.StartContainer(testContext(t), p.create(c).id); err != nil {
			assert.ErrorContains(t, err, "/work-link")
		}
	}
	require.Equal(t, seen[testnode.RunC], seen[testnode.CloudHV])
	require.Contains(t, seen[testnode.CloudHV], "end\n")
	for _, path := range []string{"/climbed", "/tmp/outside-of-image", "/outside-of-image"} {
		require.NoFileExists(t, path)
		require.NoDirExists(t, path)
	}
}
