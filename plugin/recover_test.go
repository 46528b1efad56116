// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package plugin

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/plugin"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"

	"github.com/cloudhv/containerd-cloudhv/controller"
	"github.com/cloudhv/containerd-cloudhv/controller/config"
	"github.com/cloudhv/containerd-cloudhv/vmpool/qemu"
)

// Without the list of namespaces every image looks as if nobody knew it.
func TestImagesAreKeptIfNamespacesCannotBeListed(t *testing.T) {
	dir := t.TempDir()
	content, err := local.NewStore(filepath.Join(dir, "content"))
	require.NoError(t, err)
	bdb, err := bolt.Open(filepath.Join(dir, "meta.db"), 0o600, nil)
	require.NoError(t, err)
	db := metadata.NewDB(bdb, content, nil)
	require.NoError(t, db.Init(t.Context()))
	require.NoError(t, db.Update(func(tx *bolt.Tx) error {
		return metadata.NewNamespaceStore(tx).Create(t.Context(), "k8s.io", nil)
	}))

	settings := &config.Settings{
		StateDir: filepath.Join(dir, "state"), CacheDir: filepath.Join(dir, "cache"),
		BuilderParallel: 1, RootFSTimeout: time.Second, RecoverTimeout: 10 * time.Second, CleanupTimeout: time.Second,
	}
	s := &stores{db: db, leases: metadata.NewLeaseManager(db)}
	images, err := newImages(settings, s)
	require.NoError(t, err)
	image := filepath.Join(settings.CacheDir, "images", strings.Repeat("a", 64)+".erofs")
	require.NoError(t, os.WriteFile(image, nil, 0o600))
	long := time.Now().Add(-time.Hour)
	require.NoError(t, os.Chtimes(image, long, long))
	c := controller.New(controller.Options{Settings: settings, Sandboxes: metadata.NewSandboxStore(db)})

	require.NoError(t, bdb.Close())
	<-recoverAll(t.Context(), c, images, s)
	require.FileExists(t, image)

	bdb, err = bolt.Open(filepath.Join(dir, "meta.db"), 0o600, nil)
	require.NoError(t, err)
	defer bdb.Close()
	s.db = metadata.NewDB(bdb, content, nil)
	s.leases = &emptyLeases{}
	images, err = newImages(settings, s)
	require.NoError(t, err)
	<-recoverAll(t.Context(), c, images, s)
	require.NoFileExists(t, image, "no snapshot stands behind it")
}

func TestWhyThisHypervisorIsExported(t *testing.T) {
	if _, err := exec.LookPath(qemu.DefaultBinary); err != nil {
		t.Skip("there is no QEMU here:", err)
	}
	for vmm, want := range map[string]string{"auto": "vmm is auto", "qemu": "vmm is qemu"} {
		c := config.Default()
		c.VMM, c.StateDir, c.CacheDir = vmm, t.TempDir(), t.TempDir()
		ic := initContext(t, plugin.NewPluginSet(), c)
		_, err := initController(ic)
		require.NoError(t, err)
		require.Equal(t, "qemu", ic.Meta.Exports["hypervisor"])
		require.Contains(t, ic.Meta.Exports["hypervisor_reason"], want)
		require.NotEmpty(t, ic.Meta.Exports["accelerator_reason"])
	}
}

type emptyLeases struct{ leases.Manager }

func (*emptyLeases) List(ctx context.Context, _ ...string) ([]leases.Lease, error) {
	_, err := namespaces.NamespaceRequired(ctx)
	return nil, err
}
