// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package snapshot

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

var testInputs = Inputs{Driver: "fake", Version: "1", Kernel: "k", RootFS: "r", Size: vmm.Size{VCPUs: 1, MemoryBytes: 1 << 20}}

// write makes what a driver makes.
func write(_ context.Context, dir string) (vmm.Snapshot, error) {
	for name, data := range map[string]string{MemoryFile: "ram", "state": "registers", ScratchFile: "disk"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600); err != nil {
			return vmm.Snapshot{}, err
		}
	}
	return vmm.Snapshot{Driver: "fake", Dir: dir, Size: testInputs.Size}, nil
}

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(dir)
	require.NoError(t, err)
	return s
}

func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	var list []string
	for _, e := range entries {
		list = append(list, e.Name())
	}
	return list
}

func TestMakeAndFind(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir)
	_, err := s.Find(t.Context(), testInputs)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	made, err := s.Make(t.Context(), testInputs, write)
	require.NoError(t, err)
	assert.Equal(t, filepath.Join(dir, testInputs.Key()), made.VMM.Dir)
	assert.Equal(t, []string{testInputs.Key()}, names(t, dir), "nothing is left of the making")

	// The next process reads it from disk.
	next := open(t, dir)
	_, err = next.Peek(testInputs.Key())
	require.ErrorIs(t, err, errdefs.ErrNotFound, "not read yet")
	found, err := next.Find(t.Context(), testInputs)
	require.NoError(t, err)
	assert.Equal(t, made.VMM, found.VMM)
	_, err = next.Peek(testInputs.Key())
	require.NoError(t, err)
	other := testInputs
	other.Kernel = "another"
	_, err = next.Find(t.Context(), other)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
}

// TestKey changes each input: every one must make another key.
func TestKey(t *testing.T) {
	t.Parallel()
	base := testInputs.Key()
	for name, change := range map[string]func(*Inputs){
		"driver": func(i *Inputs) { i.Driver = "x" }, "version": func(i *Inputs) { i.Version = "x" },
		"accelerator": func(i *Inputs) { i.Accelerator = "x" }, "binary": func(i *Inputs) { i.Binary = "x" }, "layout": func(i *Inputs) { i.Layout = "x" },
		"kernel": func(i *Inputs) { i.Kernel = "x" }, "rootfs": func(i *Inputs) { i.RootFS = "x" },
		"params": func(i *Inputs) { i.KernelParams = []string{"x"} }, "vcpus": func(i *Inputs) { i.Max.VCPUs = 9 },
		"memory": func(i *Inputs) { i.Size.MemoryBytes++ }, "scratch": func(i *Inputs) { i.ScratchBytes = 9 },
		"cpu": func(i *Inputs) { i.CPU = "x" },
	} {
		in := testInputs
		change(&in)
		assert.NotEqual(t, base, in.Key(), name)
	}
}

func TestParseCPU(t *testing.T) {
	t.Parallel()
	const one = "processor\t: 0\nmodel name\t: CPU A\nflags\t\t: sse avx\ncpu MHz\t\t: 2000\n\nprocessor\t: 1\nmodel name\t: CPU A\nflags\t\t: sse\n"
	a, err := parseCPU(strings.NewReader(one))
	require.NoError(t, err)
	same, err := parseCPU(strings.NewReader(strings.Replace(strings.Replace(one, "sse avx", "avx sse", 1), "2000", "3000", 1)))
	require.NoError(t, err)
	assert.Equal(t, a, same, "neither the order of features nor the clock rate counts")
	other, err := parseCPU(strings.NewReader(strings.Replace(one, "sse avx", "sse avx avx2", 1)))
	require.NoError(t, err)
	assert.NotEqual(t, a, other)
	_, err = parseCPU(strings.NewReader("nothing"))
	require.Error(t, err)
	_, err = HostCPU()
	require.NoError(t, err)
}

// TestDamage spoils a snapshot in each way; it must be noticed before it is used,
// by the process that made it and by the next, set aside, and made anew.
func TestDamage(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(t *testing.T, dir string){
		"altered memory": func(t *testing.T, dir string) { rewrite(t, filepath.Join(dir, MemoryFile), "rAm") },
		"truncated":      func(t *testing.T, dir string) { require.NoError(t, os.Truncate(filepath.Join(dir, "state"), 3)) },
		"a file missing": func(t *testing.T, dir string) { require.NoError(t, os.Remove(filepath.Join(dir, ScratchFile))) },
		"no manifest":    func(t *testing.T, dir string) { require.NoError(t, os.Remove(filepath.Join(dir, manifestFile))) },
		"no json":        func(t *testing.T, dir string) { rewrite(t, filepath.Join(dir, manifestFile), "{") },
		"other version": func(t *testing.T, dir string) {
			data, err := os.ReadFile(filepath.Join(dir, manifestFile))
			require.NoError(t, err)
			rewrite(t, filepath.Join(dir, manifestFile), strings.Replace(string(data), `"format":`+strconv.Itoa(Format), `"format":99`, 1))
		},
	} {
		for _, same := range []bool{true, false} {
			dir := t.TempDir()
			s := open(t, dir)
			_, err := s.Make(t.Context(), testInputs, write)
			require.NoError(t, err)
			spoil(t, filepath.Join(dir, testInputs.Key()))
			if !same {
				s = open(t, dir)
			} else if strings.Contains(name, "manifest") || name == "no json" || name == "other version" {
				continue // it has been read, and nothing else is
			}
			_, err = s.Peek(testInputs.Key())
			require.ErrorIs(t, err, errdefs.ErrNotFound, name)
			_, err = s.Find(t.Context(), testInputs)
			require.ErrorIs(t, err, errdefs.ErrNotFound, name)
			require.NoError(t, s.SetAside(testInputs.Key()), "as another one who saw it would")
			assert.Equal(t, []string{testInputs.Key() + damagedSuffix}, names(t, dir), name)
			_, err = s.Make(t.Context(), testInputs, write)
			require.NoError(t, err, name)
			list, err := s.List()
			require.NoError(t, err)
			require.Len(t, list, 2, name)
		}
	}
}

func rewrite(t *testing.T, path, data string) {
	t.Helper()
	require.NoError(t, os.WriteFile(path, []byte(data), 0o600))
}

func TestFailedMake(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir)
	boom := errors.New("boom")
	_, err := s.Make(t.Context(), testInputs, func(ctx context.Context, d string) (vmm.Snapshot, error) {
		_, _ = write(ctx, d)
		return vmm.Snapshot{}, boom
	})
	require.ErrorIs(t, err, boom)
	assert.Empty(t, names(t, dir))
	_, err = s.Make(t.Context(), testInputs, func(context.Context, string) (vmm.Snapshot, error) { return vmm.Snapshot{}, nil })
	require.Error(t, err, "without a disk it is none")
	assert.Empty(t, names(t, dir))
	huge := testInputs
	huge.Size.MemoryBytes = 1 << 60
	_, err = s.Make(t.Context(), huge, write)
	require.ErrorIs(t, err, errdefs.ErrResourceExhausted)
	assert.Empty(t, names(t, dir))

	// What a process left that was killed goes when the next one opens the store.
	require.NoError(t, os.MkdirAll(filepath.Join(dir, tmpPrefix+"1", "x"), 0o700))
	open(t, dir)
	assert.Empty(t, names(t, dir))
}

// TestConcurrentMake lets many ask at once, some of whom leave.
func TestConcurrentMake(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir())
	var made atomic.Int32
	enough := make(chan struct{})
	build := func(ctx context.Context, dir string) (vmm.Snapshot, error) {
		made.Add(1)
		<-enough
		return write(ctx, dir)
	}
	gone, cancel := context.WithCancel(t.Context())
	left := make(chan error, 1)
	go func() {
		_, err := s.Make(gone, testInputs, build)
		left <- err
	}()
	require.Eventually(t, func() bool { return made.Load() == 1 }, 10*time.Second, time.Millisecond)
	cancel()
	require.ErrorIs(t, <-left, context.Canceled)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			_, err := s.Make(t.Context(), testInputs, build)
			assert.NoError(t, err)
		})
	}
	close(enough)
	wg.Wait()
	assert.Equal(t, int32(1), made.Load())
}

func TestCollect(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir)
	var keys []string
	for _, kernel := range []string{"wanted", "used", "neither"} {
		in := testInputs
		in.Kernel = kernel
		_, err := s.Make(t.Context(), in, write)
		require.NoError(t, err)
		keys = append(keys, in.Key())
	}
	s.Use(keys[1], "vm")
	s.Use(keys[1], "vm")
	require.NoError(t, s.Collect(t.Context(), keys[0]))
	assert.ElementsMatch(t, keys[:2], names(t, dir))
	s.Release(keys[1], "vm")
	s.Release(keys[1], "vm")
	require.NoError(t, s.Collect(t.Context(), keys[0]))
	assert.Equal(t, keys[:1], names(t, dir))
}

// TestRebuild makes a snapshot anew: the old one stays for its users, the next
// process takes the newest, and what is wrong with that leaves the old one.
func TestRebuild(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir)
	key := testInputs.Key()
	_, err := s.Make(t.Context(), testInputs, write)
	require.NoError(t, err)
	s.Use(key, "vm")
	boom := errors.New("boom")
	_, err = s.Rebuild(t.Context(), testInputs, func(context.Context, string) (vmm.Snapshot, error) { return vmm.Snapshot{}, boom })
	require.ErrorIs(t, err, boom)
	assert.Equal(t, key, s.Current(key))

	var ids []string
	for range 11 {
		snap, err := s.Rebuild(t.Context(), testInputs, write)
		require.NoError(t, err)
		assert.Equal(t, filepath.Join(dir, snap.ID), snap.VMM.Dir)
		assert.Equal(t, snap.ID, s.Current(key))
		ids = append(ids, snap.ID)
	}
	last := key + "-11"
	assert.Equal(t, last, ids[10])
	require.NoError(t, s.Collect(t.Context(), key))
	assert.ElementsMatch(t, []string{key, last}, names(t, dir))
	u := s.Usage(key)
	assert.Positive(t, u.Current)
	assert.Equal(t, u.Current, u.Older)

	next := open(t, dir)
	assert.Equal(t, last, next.Current(key))
	snap, err := next.Find(t.Context(), testInputs)
	require.NoError(t, err)
	assert.Equal(t, last, snap.ID)
	next.Use(key, "vm")
	rewrite(t, filepath.Join(dir, last, "state"), "rEgisters")
	_, err = next.Find(t.Context(), testInputs)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	assert.Equal(t, key, next.Current(key), "the old one is whole")
	next.Release(key, "vm")
	require.NoError(t, next.Collect(t.Context()))
	assert.Equal(t, []string{last + damagedSuffix}, names(t, dir))
}
