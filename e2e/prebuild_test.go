// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
	"github.com/cloudhv/containerd-cloudhv/e2e/testregistry"
)

// prebuildNode is a node of the test's own whose option prebuild is as said.
func prebuildNode(t *testing.T, policy string) *testnode.Node {
	t.Helper()
	return ownNode(t, map[string]any{"prebuild": policy, "pool": map[string]any{"min": 0, "max": 0}})
}

// version is the tests' image with a file more, so that its layers are its own.
func version(t *testing.T, text string) v1.Image {
	t.Helper()
	img, err := testimage.Helper(suite.helper)
	require.NoError(t, err)
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	require.NoError(t, w.WriteHeader(&tar.Header{Name: "version", Mode: 0o644, Size: int64(len(text))}))
	_, err = w.Write([]byte(text))
	require.NoError(t, err)
	require.NoError(t, w.Close())
	img, err = mutate.AppendLayers(img, static.NewLayer(layer.Bytes(), types.OCIUncompressedLayer))
	require.NoError(t, err)
	return img
}

// startRegistry serves images on the loopback interface; it returns its address.
func startRegistry(t *testing.T) string {
	t.Helper()
	r := testregistry.Start()
	t.Cleanup(r.Close)
	return r.Address()
}

// pull puts an image into the registry and has crictl pull it.
func pull(t *testing.T, n *testnode.Node, ref string, img v1.Image) {
	t.Helper()
	require.NoError(t, testregistry.Push(testContext(t), ref, img))
	cli{t: t, n: n, ctx: testContext(t)}.run("pull", ref)
}

// results are what containerd's log tells of images that were to be made before a
// pod asked, by the image's name.
func results(t *testing.T, n *testnode.Node) map[string]string {
	t.Helper()
	b, err := os.ReadFile(n.LogPath())
	require.NoError(t, err)
	found := map[string]string{}
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, `msg="prebuilding an image's file system"`) {
			image, result := logField(line, "image"), logField(line, "result")
			found[image] = result
		}
	}
	return found
}

// logField is a field of a line of containerd's log.
func logField(line, key string) string {
	_, rest, _ := strings.Cut(line, " "+key+"=")
	value, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
	return strings.Trim(value, `"`)
}

func awaitPrebuilt(t *testing.T, n *testnode.Node, ref string) {
	t.Helper()
	require.NoError(t, testnode.Eventually(testContext(t), func(context.Context) error {
		if got := results(t, n); got[ref] != "built" {
			return fmt.Errorf("%s is not made: %v\n%s", ref, got, n.LogTail(2000))
		}
		return nil
	}))
}

// runVersion runs a pod that shows which version of the image it has, and returns
// how many images were made for it.
func runVersion(t *testing.T, n *testnode.Node, ref, want string) int {
	t.Helper()
	before := imageBuilds(t, n)
	p := podOn(t, n)
	c := p.start(testnode.ContainerConfig("c", ref, "/bin/sh", "-c", "cat /version; echo"))
	require.Zero(t, c.awaitExit().GetExitCode())
	c.awaitLine(want)
	p.remove()
	return imageBuilds(t, n) - before
}

// TestPrebuildAlways pulls and imports images: their first pod has nothing to wait for.
func TestPrebuildAlways(t *testing.T) {
	n := prebuildNode(t, "always")
	pulled := startRegistry(t) + "/chv/app:1"
	pull(t, n, pulled, version(t, "pulled"))
	awaitPrebuilt(t, n, pulled)
	require.Zero(t, runVersion(t, n, pulled, "pulled"))

	const imported = "localhost/chv/app:1"
	require.NoError(t, n.Import(testContext(t), imported, version(t, "imported")))
	awaitPrebuilt(t, n, imported)
	require.Zero(t, runVersion(t, n, imported, "imported"))
	requireNoViews(t, n)
}

// TestPrebuildUsed pulls versions of an image that pods run and of one that none
// does. Which that are outlives containerd.
func TestPrebuildUsed(t *testing.T) {
	n := prebuildNode(t, "used")
	host := startRegistry(t)
	app, other := host+"/chv/app", host+"/chv/other"
	pull(t, n, app+":1", version(t, "one"))
	require.Equal(t, 1, runVersion(t, n, app+":1", "one"), "nobody had run it before")
	require.NoError(t, n.Kill(testContext(t)))
	require.NoError(t, n.Start(testContext(t)))

	before := imageBuilds(t, n)
	pull(t, n, other+":1", version(t, "other"))
	pull(t, n, app+":2", version(t, "two"))
	awaitPrebuilt(t, n, app+":2")
	require.Equal(t, 1, imageBuilds(t, n)-before, "that one alone")
	require.Zero(t, runVersion(t, n, app+":2", "two"))
	require.Equal(t, 1, runVersion(t, n, other+":1", "other"))
	require.Equal(t, map[string]string{app + ":2": "built"}, results(t, n))

	// The same tag, another image.
	require.NoError(t, n.Import(testContext(t), other+":1", version(t, "imported")))
	awaitPrebuilt(t, n, other+":1")
	require.Zero(t, runVersion(t, n, other+":1", "imported"))
	requireNoViews(t, n)
}

// TestPrebuildNever pulls a second version of what a pod has run.
func TestPrebuildNever(t *testing.T) {
	n := prebuildNode(t, "never")
	app := startRegistry(t) + "/chv/app"
	for _, v := range []string{"1", "2"} {
		pull(t, n, app+":"+v, version(t, v))
		require.Equal(t, 1, runVersion(t, n, app+":"+v, v))
	}
	require.Empty(t, results(t, n))
	require.NoDirExists(t, filepath.Join(n.CacheDir(), "prebuild"))
}

// requireNoViews checks that what the making of images needed is gone.
func requireNoViews(t *testing.T, n *testnode.Node) {
	t.Helper()
	ctx := n.Context(testContext(t))
	leases, err := n.Containerd().LeasesService().List(ctx)
	require.NoError(t, err)
	for _, l := range leases {
		require.NotContains(t, l.ID, "cloudhv")
	}
	files, err := os.ReadDir(filepath.Join(n.CacheDir(), "images"))
	require.NoError(t, err)
	for _, f := range files {
		require.Equal(t, ".erofs", filepath.Ext(f.Name()))
	}
}
