// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package rootfs

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

// needRoot skips a test that mounts.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount")
	}
}

func dirNames(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func layer(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		path := filepath.Join(dir, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, []byte(content), 0o644))
	}
	return dir
}

func TestGetMakesAnImageOnceForAll(t *testing.T) {
	needRoot(t)
	f := newFixture(t)
	f.sn.slow = 50 * time.Millisecond
	dir := layer(t, map[string]string{"a": "1"})
	f.sn.add("c1", dir)
	f.sn.add("c2", dir)

	var wg sync.WaitGroup
	images := make([]*Image, 12)
	for i := range images {
		wg.Go(func() {
			img, err := f.get(t.Context(), []string{"c1", "c2"}[i%2])
			if err != nil {
				t.Error(err)
				return
			}
			images[i] = img
		})
	}
	wg.Wait()
	for _, img := range images {
		require.Equal(t, images[0].Path, img.Path)
		require.Len(t, img.Serial, 20)
		img.Release()
		img.Release()
	}
	require.Equal(t, 1, f.sn.made)
	require.Empty(t, f.pins)
	f.requireClean(t, 1)
}

func TestAnotherChainIsAnotherImage(t *testing.T) {
	needRoot(t)
	f := newFixture(t)
	f.sn.add("c1", layer(t, map[string]string{"a": "1"}))
	f.sn.add("c2", layer(t, map[string]string{"a": "2"}))
	a, err := f.get(t.Context(), "c1")
	require.NoError(t, err)
	b, err := f.get(t.Context(), "c2")
	require.NoError(t, err)
	require.NotEqual(t, a.Serial, b.Serial)
	f.requireClean(t, 2)
}

// A name that is no digest may come again with other content.
func TestAChainNameThatComesAgain(t *testing.T) {
	needRoot(t)
	f := newFixture(t)
	f.sn.addNamed("c1", "latest", layer(t, map[string]string{"a": "1"}))
	a, err := f.get(t.Context(), "c1")
	require.NoError(t, err)
	time.Sleep(time.Millisecond)
	f.sn.addNamed("c1", "latest", layer(t, map[string]string{"a": "2"}))
	b, err := f.get(t.Context(), "c1")
	require.NoError(t, err)
	require.NotEqual(t, a.Key, b.Key)
}

func TestAnImageWithoutLayers(t *testing.T) {
	needRoot(t)
	f := newFixture(t)
	f.sn.addNamed("c1", "", "")
	img, err := f.get(t.Context(), "c1")
	require.NoError(t, err)
	require.Empty(t, dirNames(t, mountImage(t, img.Path)))
	f.requireClean(t, 1)
}

func TestFailuresLeaveNothing(t *testing.T) {
	needRoot(t)
	errView := errors.New("no view today")
	for name, tc := range map[string]struct {
		prepare func(*testing.T, *fixture) context.Context
		want    error
	}{
		"no such snapshot": {func(t *testing.T, f *fixture) context.Context {
			delete(f.sn.infos, "c1")
			return t.Context()
		}, errdefs.ErrNotFound},
		"view": {func(t *testing.T, f *fixture) context.Context {
			f.sn.failView = errView
			return t.Context()
		}, errView},
		"mount": {func(t *testing.T, f *fixture) context.Context {
			f.sn.trees[f.sn.infos["c1"].Parent] = []string{"/nonexistent"}
			return t.Context()
		}, unix.ENOENT},
		"no builder": {func(t *testing.T, f *fixture) context.Context {
			f.cfg.Builder.Binary = "/nonexistent/mkfs.erofs"
			return t.Context()
		}, errdefs.ErrFailedPrecondition},
		"builder fails": {func(t *testing.T, f *fixture) context.Context {
			f.cfg.Builder.Binary = "/bin/false"
			return t.Context()
		}, errdefs.ErrInternal},
		"image too large": {func(t *testing.T, f *fixture) context.Context {
			f.cfg.Builder.ImageSize = 8192
			return t.Context()
		}, errdefs.ErrInternal},
		"too little memory": {func(t *testing.T, f *fixture) context.Context {
			f.cfg.Builder.Memory = 1 << 20
			return t.Context()
		}, errdefs.ErrInternal},
		"builder hangs": {func(t *testing.T, f *fixture) context.Context {
			f.cfg.Timeout = 200 * time.Millisecond
			f.cfg.Builder.Binary = script(t, "sleep 1000 & sleep 1000")
			return t.Context()
		}, context.DeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			f.sn.add("c1", layer(t, map[string]string{"a": strings.Repeat("x", 100000)}))
			ctx := tc.prepare(t, f)
			_, err := f.get(ctx, "c1")
			if name == "image too large" && errdefs.IsResourceExhausted(err) {
				err = errdefs.ErrInternal
			}
			require.ErrorIs(t, err, tc.want)
			require.Empty(t, f.pins)
			f.requireClean(t, 0)
		})
	}
}

func script(t *testing.T, body string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "builder")
	require.NoError(t, os.WriteFile(path, []byte("#!/bin/sh\n"+body+"\n"), 0o755))
	return path
}

// Whoever asked first may leave; the others still get the image.
func TestACallerThatLeaves(t *testing.T) {
	needRoot(t)
	f := newFixture(t)
	f.sn.slow = 300 * time.Millisecond
	f.sn.add("c1", layer(t, map[string]string{"a": "1"}))
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := f.get(ctx, "c1")
	require.ErrorIs(t, err, context.DeadlineExceeded)
	img, err := f.get(t.Context(), "c1")
	require.NoError(t, err)
	require.FileExists(t, img.Path)
	require.Equal(t, 1, f.sn.made)
	f.requireClean(t, 1)
}

// Another process that makes the same image is waited for.
func TestAnotherProcessMakesIt(t *testing.T) {
	needRoot(t)
	f := newFixture(t)
	chain := f.sn.add("c1", layer(t, map[string]string{"a": "1"}))
	key := chainKey(testNamespace, "fake", f.sn.infos[chain])
	other, err := os.OpenFile(f.path(key, tmpSuffix), os.O_CREATE|os.O_RDWR, 0o600)
	require.NoError(t, err)
	require.NoError(t, unix.Flock(int(other.Fd()), unix.LOCK_EX))
	go func() {
		time.Sleep(100 * time.Millisecond)
		_ = os.WriteFile(other.Name(), []byte("theirs"), 0o600)
		_ = os.Rename(other.Name(), f.path(key, imageSuffix))
		_ = other.Close()
	}()
	img, err := f.get(t.Context(), "c1")
	require.NoError(t, err)
	data, err := os.ReadFile(img.Path)
	require.NoError(t, err)
	require.Equal(t, "theirs", string(data))
	require.Zero(t, f.sn.made)
	f.requireClean(t, 1)
}

func TestCleanRemovesWhatACrashLeft(t *testing.T) {
	needRoot(t)
	f := newFixture(t)
	src := layer(t, map[string]string{"precious": "1"})
	key := strings.Repeat("a", keyLen)
	require.NoError(t, os.WriteFile(f.path(key, tmpSuffix), []byte("half"), 0o600))
	dir := f.path(key, mountSuffix)
	require.NoError(t, os.Mkdir(dir, 0o700))
	require.NoError(t, mount.All([]mount.Mount{{Type: "bind", Source: src, Options: []string{"ro", "bind"}}}, dir))
	lease := leases.Lease{ID: namePrefix + "x", Labels: map[string]string{leaseLabel: f.cfg.Dir}}
	f.leases.all[lease.ID] = lease
	f.leases.held[lease.ID] = []leases.Resource{{ID: lease.ID, Type: "snapshots/fake"}}
	f.sn.views[lease.ID] = "chain"
	foreign := leases.Lease{ID: "someone's", Labels: map[string]string{}}
	f.leases.all[foreign.ID] = foreign

	require.NoError(t, f.Clean(t.Context(), []string{testNamespace}))
	require.Equal(t, map[string]leases.Lease{foreign.ID: foreign}, f.leases.all)
	delete(f.leases.all, foreign.ID)
	f.requireClean(t, 0)
	require.FileExists(t, filepath.Join(src, "precious"))
}

// The writer may end after its image has its name and before the view is unmounted.
func TestCleanRemovesTheViewOfAWholeImage(t *testing.T) {
	needRoot(t)
	f := newFixture(t)
	chain := f.sn.add("c1", layer(t, map[string]string{"a": "1"}))
	img, err := f.get(t.Context(), "c1")
	require.NoError(t, err)
	img.Release()
	dir := f.path(chainKey(testNamespace, "fake", f.sn.infos[chain]), mountSuffix)
	require.NoError(t, os.Mkdir(dir, 0o700))
	src := f.sn.trees[chain][0]
	require.NoError(t, mount.All([]mount.Mount{{Type: "bind", Source: src, Options: []string{"ro", "bind"}}}, dir))
	t.Cleanup(func() { _ = unmount(dir) })

	require.NoError(t, f.Clean(t.Context(), nil))
	f.requireClean(t, 1)
	require.FileExists(t, img.Path)
	require.FileExists(t, filepath.Join(src, "a"))
}

func TestCleanLeavesALivingBuilderAlone(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	key := strings.Repeat("b", keyLen)
	other, err := os.OpenFile(f.path(key, tmpSuffix), os.O_CREATE|os.O_RDWR, 0o600)
	require.NoError(t, err)
	defer other.Close()
	require.NoError(t, unix.Flock(int(other.Fd()), unix.LOCK_EX))
	require.NoError(t, os.Mkdir(f.path(key, mountSuffix), 0o700))
	require.NoError(t, f.Clean(t.Context(), nil))
	require.FileExists(t, other.Name())
	require.DirExists(t, f.path(key, mountSuffix))
}

func TestForgetRemovesImagesWithoutSnapshots(t *testing.T) {
	needRoot(t)
	f := newFixture(t)
	gone := f.sn.add("c1", layer(t, map[string]string{"a": "1"}))
	f.sn.add("c2", layer(t, map[string]string{"a": "2"}))
	used := f.sn.add("c3", layer(t, map[string]string{"a": "3"}))
	a, err := f.get(t.Context(), "c1")
	require.NoError(t, err)
	b, err := f.get(t.Context(), "c2")
	require.NoError(t, err)
	c, err := f.get(t.Context(), "c3")
	require.NoError(t, err)
	a.Release()
	b.Release()
	delete(f.sn.infos, gone)
	delete(f.sn.infos, used)
	require.NoError(t, f.Forget(t.Context(), []string{testNamespace}, []string{"fake"}))
	require.NoFileExists(t, a.Path)
	require.FileExists(t, b.Path, "its snapshot is there")
	require.FileExists(t, c.Path, "it is in use")
}

func TestTheCacheIsTrimmedByLastUse(t *testing.T) {
	needRoot(t)
	f := newFixture(t)
	var images []*Image
	for i, name := range []string{"c1", "c2", "c3"} {
		f.sn.add(name, layer(t, map[string]string{"a": strings.Repeat(name, 10000)}))
		img, err := f.get(t.Context(), name)
		require.NoError(t, err)
		old := time.Now().Add(time.Duration(i-10) * time.Hour)
		require.NoError(t, os.Chtimes(img.Path, old, old))
		images = append(images, img)
	}
	st, err := os.Stat(images[1].Path)
	require.NoError(t, err)
	images[1].Release()
	images[2].Release()
	f.cfg.CacheLimit = st.Size()
	f.trim(t.Context())
	require.FileExists(t, images[0].Path, "pinned, though oldest")
	require.NoFileExists(t, images[1].Path)
	require.FileExists(t, images[2].Path)
}
