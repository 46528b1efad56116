// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package rootfs

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
)

const testNamespace = "test"

// fakeSnapshotter serves committed snapshots that are lists of layer
// directories, topmost first, and keeps account of views.
type fakeSnapshotter struct {
	snapshots.Snapshotter

	mu    sync.Mutex
	infos map[string]snapshots.Info
	trees map[string][]string
	views map[string]string
	// failView makes View fail.
	failView error
	// slow delays View.
	slow time.Duration
	made int
	// usage is every snapshot's size.
	usage int64
}

func newFakeSnapshotter() *fakeSnapshotter {
	return &fakeSnapshotter{
		infos: map[string]snapshots.Info{}, trees: map[string][]string{}, views: map[string]string{},
	}
}

// add commits a chain of layers and prepares a container's snapshot on it.
func (f *fakeSnapshotter) add(container string, layers ...string) (chain string) {
	chain = digest.FromString(fmt.Sprint(layers)).String()
	f.addNamed(container, chain, layers...)
	return chain
}

func (f *fakeSnapshotter) addNamed(container, chain string, layers ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.infos[chain] = snapshots.Info{Kind: snapshots.KindCommitted, Name: chain, Created: time.Now()}
	f.trees[chain] = layers
	f.infos[container] = snapshots.Info{Kind: snapshots.KindActive, Name: container, Parent: chain}
}

func (f *fakeSnapshotter) Stat(ctx context.Context, key string) (snapshots.Info, error) {
	if _, err := namespaces.NamespaceRequired(ctx); err != nil {
		return snapshots.Info{}, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	info, ok := f.infos[key]
	if !ok {
		return info, fmt.Errorf("%s: %w", key, errdefs.ErrNotFound)
	}
	return info, nil
}

func (f *fakeSnapshotter) Usage(_ context.Context, key string) (snapshots.Usage, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.infos[key]; !ok {
		return snapshots.Usage{}, fmt.Errorf("%s: %w", key, errdefs.ErrNotFound)
	}
	return snapshots.Usage{Size: f.usage}, nil
}

func (f *fakeSnapshotter) View(ctx context.Context, key, parent string, _ ...snapshots.Opt) ([]mount.Mount, error) {
	if id, ok := leases.FromContext(ctx); !ok || id != key {
		return nil, fmt.Errorf("view %s is not under its lease: %w", key, errdefs.ErrFailedPrecondition)
	}
	time.Sleep(f.slow)
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failView != nil {
		return nil, f.failView
	}
	f.views[key] = parent
	f.made++
	layers := f.trees[parent]
	if len(layers) == 1 {
		return []mount.Mount{{Type: "bind", Source: layers[0], Options: []string{"ro", "rbind"}}}, nil
	}
	lower := "lowerdir="
	for i, l := range layers {
		if i > 0 {
			lower += ":"
		}
		lower += l
	}
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{lower}}}, nil
}

func (f *fakeSnapshotter) Remove(_ context.Context, key string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.views[key]; !ok {
		return fmt.Errorf("%s: %w", key, errdefs.ErrNotFound)
	}
	delete(f.views, key)
	return nil
}

func (f *fakeSnapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, _ ...string) error {
	f.mu.Lock()
	infos := slices.Collect(maps.Values(f.infos))
	f.mu.Unlock()
	for _, info := range infos {
		if err := fn(ctx, info); err != nil {
			return err
		}
	}
	return nil
}

// fakeLeases is a lease manager that remembers.
type fakeLeases struct {
	leases.Manager

	mu   sync.Mutex
	all  map[string]leases.Lease
	held map[string][]leases.Resource
}

func newFakeLeases() *fakeLeases {
	return &fakeLeases{all: map[string]leases.Lease{}, held: map[string][]leases.Resource{}}
}

func (f *fakeLeases) Create(_ context.Context, opts ...leases.Opt) (leases.Lease, error) {
	var l leases.Lease
	for _, opt := range opts {
		if err := opt(&l); err != nil {
			return l, err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.all[l.ID] = l
	return l, nil
}

func (f *fakeLeases) Delete(_ context.Context, l leases.Lease, _ ...leases.DeleteOpt) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.all, l.ID)
	return nil
}

func (f *fakeLeases) List(context.Context, ...string) ([]leases.Lease, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Collect(maps.Values(f.all)), nil
}

func (f *fakeLeases) ListResources(_ context.Context, l leases.Lease) ([]leases.Resource, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.held[l.ID], nil
}

// fixture is a Store on fakes.
type fixture struct {
	*Store
	sn     *fakeSnapshotter
	leases *fakeLeases
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{sn: newFakeSnapshotter(), leases: newFakeLeases()}
	s, err := New(Config{
		Dir:        t.TempDir(),
		CacheLimit: 1 << 40,
		Parallel:   2,
		Timeout:    2 * time.Minute,
		Builder:    Builder{Memory: 1 << 30, ImageSize: 16 << 30},
		Snapshotter: func(name string) (snapshots.Snapshotter, error) {
			if name != "fake" {
				return nil, errdefs.ErrNotFound
			}
			return f.sn, nil
		},
		Leases: f.leases,
	})
	require.NoError(t, err)
	f.Store = s
	return f
}

func (f *fixture) get(ctx context.Context, container string) (*Image, error) {
	return f.Get(ctx, Source{Namespace: testNamespace, Snapshotter: "fake", Key: container})
}

// requireClean checks that nothing but whole images is left.
func (f *fixture) requireClean(t *testing.T, images int) {
	t.Helper()
	require.Empty(t, f.sn.views, "views")
	require.Empty(t, f.leases.all, "leases")
	files := dirNames(t, f.cfg.Dir)
	require.Len(t, files, images, "files: %v", files)
}
