// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package prebuild

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	eventstypes "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/events/exchange"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/cloudhv/containerd-cloudhv/controller/rootfs"
	"github.com/cloudhv/containerd-cloudhv/vmpool"
	"github.com/cloudhv/containerd-cloudhv/vmpool/durable"
)

func TestMain(m *testing.M) {
	// An exchange of containerd's has no end.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/docker/go-events.(*Broadcaster).run"))
}

const (
	testNS = "k8s.io"
	soon   = 10 * time.Second
)

// fakeImages is containerd's image store, for one namespace.
type fakeImages struct {
	images.Store

	mu  sync.Mutex
	all map[string]images.Image
}

func (f *fakeImages) Get(ctx context.Context, name string) (images.Image, error) {
	ns, err := namespaces.NamespaceRequired(ctx)
	f.mu.Lock()
	defer f.mu.Unlock()
	img, ok := f.all[name]
	if err != nil || ns != testNS || !ok {
		return images.Image{}, fmt.Errorf("image %q of %s: %w", name, ns, errdefs.ErrNotFound)
	}
	return img, nil
}

// List knows the one filter that is used.
func (f *fakeImages) List(_ context.Context, filters ...string) ([]images.Image, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.DeleteFunc(slices.Collect(maps.Values(f.all)), func(img images.Image) bool {
		return len(filters) != 1 || filters[0] != fmt.Sprintf("target.digest==%q", img.Target.Digest)
	}), nil
}

// fakeBuilder remembers what it was asked for. Snapshots are what is unpacked.
type fakeBuilder struct {
	mu        sync.Mutex
	snapshots map[rootfs.Source]bool // with an image or without
	asked     []rootfs.Source
	running   int
	most      int
	// gate, if set, is waited for by every Prebuild; err is what they return.
	gate chan struct{}
	err  error
}

func (f *fakeBuilder) Has(_ context.Context, src rootfs.Source) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	has, ok := f.snapshots[src]
	if !ok {
		return false, errdefs.ErrNotFound
	}
	return has, nil
}

func (f *fakeBuilder) Prebuild(ctx context.Context, src rootfs.Source, since time.Time, turns rootfs.Turns) error {
	f.mu.Lock()
	f.asked = append(f.asked, src)
	f.running++
	f.most = max(f.most, f.running)
	gate, err := f.gate, f.err
	if since.IsZero() || turns == nil {
		err = errdefs.ErrInvalidArgument
	}
	f.mu.Unlock()
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.running--
	switch {
	case err == nil, errdefs.IsAlreadyExists(err):
		f.snapshots[src] = true
	case errdefs.IsNotFound(err):
		delete(f.snapshots, src)
	}
	return err
}

// rig is a Prebuilder on fakes, and a containerd that pulls.
type rig struct {
	t       *testing.T
	cfg     Config
	images  *fakeImages
	builder *fakeBuilder
	content content.Store
	bus     *exchange.Exchange
	*Prebuilder
}

func newRig(t *testing.T, policy string) *rig {
	t.Helper()
	store, err := local.NewStore(filepath.Join(t.TempDir(), "content"))
	require.NoError(t, err)
	r := &rig{
		t: t, content: store, bus: exchange.NewExchange(), images: &fakeImages{all: map[string]images.Image{}},
		builder: &fakeBuilder{snapshots: map[rootfs.Source]bool{}},
	}
	r.cfg = Config{
		Policy: policy, Dir: filepath.Join(t.TempDir(), "prebuild"), Builder: r.builder, Turns: vmpool.NewTurns(),
		Snapshotters: []string{"native", "overlayfs"}, Images: r.images, Content: store, Events: r.bus,
	}
	r.Prebuilder = New(t.Context(), r.cfg)
	t.Cleanup(func() { require.NoError(t, r.Close()) })
	return r
}

// restart ends the Prebuilder, and makes another as the next containerd does.
func (r *rig) restart(during ...func()) {
	r.t.Helper()
	require.NoError(r.t, r.Close())
	for _, f := range during {
		f()
	}
	r.Prebuilder = New(r.t.Context(), r.cfg)
}

func (r *rig) ctx() context.Context { return namespaces.WithNamespace(r.t.Context(), testNS) }

// blob writes a value into the content store.
func (r *rig) blob(mediaType string, v any) ocispec.Descriptor {
	r.t.Helper()
	data, err := json.Marshal(v)
	require.NoError(r.t, err)
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	require.NoError(r.t, content.WriteBlob(r.ctx(), r.content, string(desc.Digest), bytes.NewReader(data), desc))
	return desc
}

// build makes an image of as many layers; what names it makes it another. It
// returns the name of its topmost snapshot.
func (r *rig) build(what string, layers int, platform ocispec.Platform) (ocispec.Descriptor, string) {
	r.t.Helper()
	var diffs []digest.Digest
	for i := range layers {
		diffs = append(diffs, digest.FromString(fmt.Sprint(what, i)))
	}
	cfg := r.blob(ocispec.MediaTypeImageConfig, ocispec.Image{Platform: platform, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: diffs}})
	manifest := r.blob(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: cfg,
	})
	manifest.Platform = &platform
	index := r.blob(ocispec.MediaTypeImageIndex, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{manifest},
	})
	return index, identity.ChainID(diffs).String()
}

// know makes an image known by a name, and tells whether it was.
func (r *rig) know(name string, target ocispec.Descriptor) (known bool) {
	r.images.mu.Lock()
	defer r.images.mu.Unlock()
	_, known = r.images.all[name]
	r.images.all[name] = images.Image{Name: name, Target: target, UpdatedAt: time.Now()}
	return known
}

// name makes an image known, and tells of it.
func (r *rig) name(name string, target ocispec.Descriptor) {
	r.t.Helper()
	if r.know(name, target) {
		require.NoError(r.t, r.bus.Publish(r.ctx(), "/images/update", &eventstypes.ImageUpdate{Name: name}))
		return
	}
	require.NoError(r.t, r.bus.Publish(r.ctx(), "/images/create", &eventstypes.ImageCreate{Name: name}))
}

func source(snapshotter, chain string) rootfs.Source {
	return rootfs.Source{Namespace: testNS, Snapshotter: snapshotter, Key: chain}
}

// unpack makes a snapshot, and tells of it.
func (r *rig) unpack(snapshotter, chain string) {
	r.t.Helper()
	r.builder.mu.Lock()
	if _, ok := r.builder.snapshots[source(snapshotter, chain)]; !ok {
		r.builder.snapshots[source(snapshotter, chain)] = false
	}
	r.builder.mu.Unlock()
	require.NoError(r.t, r.bus.Publish(r.ctx(), "/snapshot/commit",
		&eventstypes.SnapshotCommit{Key: "extract", Name: chain, Snapshotter: snapshotter}))
}

// pull brings in an image as CRI does: unpacked first, then by three names. It
// returns the name of its topmost snapshot.
func (r *rig) pull(repo, tag string) string {
	r.t.Helper()
	target, chain := r.build(repo+tag, 2, platforms.DefaultSpec())
	r.unpack("overlayfs", chain)
	for _, name := range []string{repo + ":" + tag, digest.FromString(repo + tag).String(), repo + "@" + string(target.Digest)} {
		r.name(name, target)
	}
	return chain
}

// awaitAsked waits until the builder was asked for these, in this order.
func (r *rig) awaitAsked(want ...rootfs.Source) {
	r.t.Helper()
	require.Eventually(r.t, func() bool {
		r.builder.mu.Lock()
		defer r.builder.mu.Unlock()
		return slices.Equal(want, r.builder.asked) && (r.builder.gate != nil || r.builder.running == 0)
	}, soon, time.Millisecond, "want %v", want)
}

// saved is what is on disk; nothing, before anything was written.
func (r *rig) saved() *memory {
	r.t.Helper()
	m := &memory{}
	if err := durable.ReadJSON(filepath.Join(r.cfg.Dir, memoryFile), maxMemory, m); !errdefs.IsDataLoss(err) && !errdefs.IsNotFound(err) {
		require.NoError(r.t, err)
	}
	return m
}
