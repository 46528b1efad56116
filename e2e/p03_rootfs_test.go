// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"k8s.io/client-go/tools/remotecommand"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// notTheImages are paths that the runtime puts into a container.
var notTheImages = []string{"/proc", "/sys", "/dev", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf"}

// TestRootFS is point 3: what the image holds is what the container sees.
func TestRootFS(t *testing.T) {
	node(t)
	listings := map[string][]string{}
	for _, h := range suite.handlers {
		start := time.Now()
		listings[h] = listing(t, h)
		t.Logf("%s: %d files listed in %s", h, len(listings[h]), time.Since(start).Round(time.Millisecond))
		require.Greater(t, len(listings[h]), testimage.SmallFiles-1500)
	}
	for h, l := range listings {
		t.Run(h, func(t *testing.T) { checkListing(t, l) })
	}
	t.Run("cloudhv as runc", func(t *testing.T) {
		for _, h := range []string{testnode.RunC, testnode.CloudHV} {
			if listings[h] == nil {
				t.Skipf("E2E_HANDLERS leaves %s out", h)
			}
		}
		compareListings(t, listings[testnode.RunC], listings[testnode.CloudHV])
	})
}

func listing(t *testing.T, h string) []string {
	t.Helper()
	p := newPod(t, h)
	c := p.start(testnode.ContainerConfig("c", testimage.NastyRef, testimage.HelperPath, "term", "0"))
	var out, errOut strings.Builder
	err := c.stream(remotecommand.StreamOptions{Stdout: &out, Stderr: &errOut}, append([]string{testimage.HelperPath, "list", "/"}, notTheImages...)...)
	require.NoError(t, err, "%s", &errOut)
	lines := strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
	for i, l := range lines {
		// The runtime puts files into these two, which changes their times.
		if strings.HasPrefix(l, `"/" `) || strings.HasPrefix(l, `"/etc" `) {
			lines[i] = l[:strings.LastIndexByte(l, ' ')]
		}
	}
	return lines
}

// checkListing makes sure of what the layers were made for: the yardstick, runc,
// has to be right itself.
func checkListing(t *testing.T, lines []string) {
	byPath := map[string]string{}
	for _, l := range lines {
		path, err := strconv.QuotedPrefix(l)
		require.NoError(t, err)
		name, err := strconv.Unquote(path)
		require.NoError(t, err)
		byPath[name] = strings.TrimPrefix(l, path+" ")
	}
	for _, gone := range []string{"/n/opaque/file", "/n/gone/file", "/n/pair-b", "/n/many/03", "/n/many/04/04499", "/n/to-link/inside"} {
		require.NotContains(t, byPath, gone)
	}
	for path, part := range map[string]string{
		"/n/removed":                   "104755 1000:0",
		"/n/opaque":                    "40700 1:2",
		"/n/opaque/sub/only":           "100644",
		"/n/modes/f4755":               "104755",
		"/n/dev/null":                  "20666 0:0 0 103",
		"/n/links/two":                 `"/n/links/one" user.hard=796573`,
		"/n/links/sub/three":           `"/n/links/one"`,
		"/n/kept/linked-later":         `"/n/kept/file"`,
		"/n/xattrs/capability":         "security.capability=0100000200200000",
		"/n/names/new\nline":           "100644",
		"/n/names/invalid\xff\xfeutf8": "100644",
		"/n/links/self":                `120777 0:0 4 0 "self"`,
		"/n/many/19/19999":             "100644 99:0",
		"/n/many/04/04500":             "100644",
		"/n/to-dir/inside":             "100644",
	} {
		require.Contains(t, byPath[path], part, path)
	}
}

func compareListings(t *testing.T, want, got []string) {
	inGot, inWant := map[string]bool{}, map[string]bool{}
	for _, l := range got {
		inGot[l] = true
	}
	for _, l := range want {
		inWant[l] = true
	}
	var diff []string
	for _, l := range want {
		if !inGot[l] {
			diff = append(diff, "- "+l)
		}
	}
	for _, l := range got {
		if !inWant[l] {
			diff = append(diff, "+ "+l)
		}
	}
	const shown = 40
	require.Empty(t, diff[:min(len(diff), shown)], "%d lines differ (- runc, + cloudhv)", len(diff))
}

// TestRootFSImages checks the images in the cache: one for each chain of layers
// however many pods use it, and not larger than what is in it, so that a hard
// link is not a copy.
func TestRootFSImages(t *testing.T) {
	requireCloudHV(t)
	n := node(t)
	images := func() map[string]int64 {
		sizes := map[string]int64{}
		require.NoError(t, filepath.WalkDir(n.CacheDir(), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".erofs") {
				return err
			}
			info, err := d.Info()
			sizes[path] = info.Size()
			return err
		}))
		return sizes
	}
	before := images()
	// Nasty and Helper: busybox has some 300 links, which would be 600 MB as copies.
	require.Len(t, before, 2)
	for path, size := range before {
		require.Less(t, size, int64(160<<20), path)
	}
	for range 2 {
		p := newPod(t, testnode.CloudHV)
		p.idle("a")
		p.idle("b")
	}
	require.Equal(t, before, images())
}

// TestRootFSBuild removes the cache of images and asks for the same image from
// several pods at once: it is built once, and all get it.
func TestRootFSBuild(t *testing.T) {
	requireCloudHV(t)
	n := node(t)
	entries, err := os.ReadDir(filepath.Join(n.CacheDir(), "images"))
	require.NoError(t, err)
	for _, e := range entries {
		require.NoError(t, os.Remove(filepath.Join(n.CacheDir(), "images", e.Name())))
	}
	const pods = 3
	before := imageBuilds(t, n)
	started := make(chan error, pods)
	for i := range pods {
		p := newPod(t, testnode.CloudHV)
		cfg := idleConfig(fmt.Sprint("c", i))
		go func() {
			id, err := n.CreateContainer(testContext(t), p.id, p.cfg, cfg)
			if err == nil {
				err = n.StartContainer(testContext(t), id)
			}
			started <- err
		}()
	}
	for range pods {
		require.NoError(t, <-started)
	}
	after, err := os.ReadDir(filepath.Join(n.CacheDir(), "images"))
	require.NoError(t, err)
	require.Len(t, after, 1)
	require.Equal(t, 1, imageBuilds(t, n)-before, "built once, however many ask")
	// The other image comes back when it is needed; the census expects it.
	p := newPod(t, testnode.CloudHV)
	c := p.start(testnode.ContainerConfig("c", testimage.NastyRef, testimage.HelperPath, "exit", "0"))
	require.Zero(t, c.awaitExit().GetExitCode())
	require.Equal(t, 2, imageBuilds(t, n)-before)
}

// imageBuilds is how many images have been built, by containerd's log.
func imageBuilds(t *testing.T, n *testnode.Node) int {
	t.Helper()
	log, err := os.ReadFile(n.LogPath())
	require.NoError(t, err)
	return strings.Count(string(log), `msg="made image file system"`)
}
