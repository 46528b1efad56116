// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testimage

import (
	"archive/tar"
	"errors"
	"io"
	"os"
	"runtime"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/stretchr/testify/require"
)

// files are the headers of an image's files, by name.
func files(t *testing.T, img v1.Image) map[string]*tar.Header {
	t.Helper()
	r := mutate.Extract(img)
	defer r.Close()
	found := map[string]*tar.Header{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return found
		}
		require.NoError(t, err)
		found[h.Name] = h
	}
}

func TestCRISuite(t *testing.T) {
	t.Parallel()
	const packages = "../../build/cache/critest"
	if _, err := os.Stat(packages); err != nil {
		t.Skip("`make critest` has not unpacked packages: ", err)
	}
	imgs, err := CRISuite(packages, []byte("program"))
	require.NoError(t, err)
	require.Len(t, imgs, 21)

	nnp := files(t, imgs[criE2E+"nonewprivs:1.3"])
	require.EqualValues(t, 0o4755, nnp["nnp"].Mode)
	require.Equal(t, "bin/busybox", nnp["bin/sh"].Linkname)
	require.EqualValues(t, tar.TypeLink, nnp["bin/sh"].Typeflag)
	require.EqualValues(t, tar.TypeReg, nnp["usr/bin/pgrep"].Typeflag)
	for _, ref := range []string{criE2E + "nginx:1.14-2", criStaging + "hostnet-nginx-" + runtime.GOARCH + ":latest"} {
		nginx := files(t, imgs[ref])
		require.Contains(t, nginx, "lib/libc.so.6", ref)
		require.Contains(t, nginx, "lib/libpcre2-8.so.0", ref)
	}

	id := func(ref string) string {
		h, err := imgs[ref].ConfigName()
		require.NoError(t, err, ref)
		return h.String()
	}
	require.Equal(t, id("registry.k8s.io/pause:3.9"), id("k8s.gcr.io/pause:3.9"))
	require.Equal(t, id(criStaging+"test-image-tags:1"), id(criStaging+"test-image-tags:3"))
	ids := map[string]bool{}
	for ref := range imgs {
		ids[id(ref)] = true
	}
	require.Len(t, ids, len(imgs)-3, "all others differ")
}

func TestCRISuiteWithoutPackages(t *testing.T) {
	t.Parallel()
	_, err := CRISuite(t.TempDir()+"/none", nil)
	require.ErrorContains(t, err, "hack/setup/packages.sh files critest")
	_, err = CRISuite(t.TempDir(), nil)
	require.ErrorContains(t, err, "bin/busybox")
}
