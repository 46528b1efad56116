// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package rootfs

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	introspection "github.com/containerd/containerd/api/services/introspection/v1"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	services "github.com/containerd/containerd/v2/core/introspection"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/snapshots/native"
	"github.com/opencontainers/go-digest"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// plugins says of every plugin that it can do nothing in particular.
type plugins struct{ services.Service }

func (plugins) Plugins(context.Context, ...string) (*introspection.PluginsResponse, error) {
	return &introspection.PluginsResponse{Plugins: []*introspection.Plugin{{}}}, nil
}

// oneLayer is an image.
type oneLayer struct{ containerd.Image }

var diffID = digest.FromString("layer")

func (oneLayer) Name() string                                    { return "image" }
func (oneLayer) RootFS(context.Context) ([]digest.Digest, error) { return []digest.Digest{diffID}, nil }

// TestImageOf has containerd's own client make the snapshot of a container in a user
// namespace, by a snapshotter that maps no IDs.
func TestImageOf(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root gives files away")
	}
	ctx := namespaces.WithNamespace(t.Context(), testNamespace)
	sn, err := native.NewSnapshotter(t.TempDir())
	require.NoError(t, err)
	defer sn.Close()
	mounts, err := sn.Prepare(ctx, "layer", "")
	require.NoError(t, err)
	require.NoError(t, mount.WithTempMount(ctx, mounts, func(root string) error {
		return os.WriteFile(filepath.Join(root, "file"), nil, 0o644)
	}))
	require.NoError(t, sn.Commit(ctx, diffID.String(), "layer"))
	client, err := containerd.New("", containerd.WithServices(
		containerd.WithSnapshotters(map[string]snapshots.Snapshotter{"native": sn}), containerd.WithIntrospectionService(plugins{})))
	require.NoError(t, err)
	for id, opts := range map[string][]snapshots.Opt{
		"plain": nil, "mapped": {containerd.WithRemapperLabels(0, 131072, 0, 262144, 65536)},
	} {
		require.NoError(t, containerd.WithNewSnapshot(id, oneLayer{}, opts...)(ctx, client, &containers.Container{Snapshotter: "native"}))
		info, err := sn.Stat(ctx, id)
		require.NoError(t, err)
		require.Equal(t, id == "mapped", info.Parent != diffID.String(), "the test tests nothing")
		got, err := imageOf(ctx, sn, info)
		require.NoError(t, err)
		require.Equal(t, diffID.String(), got)
	}

	// A snapshotter that maps IDs has the image below the container.
	mounts, err = sn.Prepare(ctx, "by itself", diffID.String(), containerd.WithRemapperLabels(0, 131072, 0, 262144, 65536))
	require.NoError(t, err)
	require.NoError(t, mount.WithReadonlyTempMount(ctx, mounts, func(root string) error {
		var st unix.Stat_t
		require.NoError(t, unix.Stat(filepath.Join(root, "file"), &st))
		require.Zero(t, st.Uid)
		return nil
	}))
	info, err := sn.Stat(ctx, "by itself")
	require.NoError(t, err)
	got, err := imageOf(ctx, sn, info)
	require.NoError(t, err)
	require.Equal(t, diffID.String(), got)

	_, err = remappedName("x", "0:1", "0:1:2")
	require.ErrorContains(t, err, `"0:1" is not CONTAINER:HOST:SIZE`)
}
