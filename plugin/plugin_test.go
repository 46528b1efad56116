// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package plugin

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"github.com/containerd/ttrpc"
	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/controller"
	"github.com/cloudhv/containerd-cloudhv/controller/config"
)

func TestTypesAreContainerds(t *testing.T) {
	t.Parallel()
	require.Equal(t, plugins.SandboxControllerPlugin, sandboxControllerPlugin)
	require.Equal(t, plugins.TTRPCPlugin, ttrpcPlugin)
	require.Equal(t, plugins.GRPCPlugin, grpcPlugin)
	require.Equal(t, plugins.MetadataPlugin, metadataPlugin)
	require.Equal(t, plugins.LeasePlugin, leasePlugin)
	require.Equal(t, plugins.SnapshotPlugin, snapshotPlugin)
	require.Equal(t, plugins.EventPlugin, eventPlugin)
	require.Equal(t, plugins.PropertyTTRPCAddress, propertyTTRPCAddress)
}

func TestRegistrations(t *testing.T) {
	t.Parallel()
	found := map[string]*plugin.Registration{}
	for _, r := range registry.Graph(func(*plugin.Registration) bool { return false }) {
		if r.ID == ID {
			found[r.Type.String()] = &r
		}
	}
	require.Len(t, found, 3)
	require.Equal(t, config.Default(), found["io.containerd.sandbox.controller.v1"].Config)
	require.Contains(t, found, "io.containerd.ttrpc.v1")
	require.Contains(t, found, "io.containerd.grpc.v1")
}

func initContext(t *testing.T, set *plugin.Set, cfg any) *plugin.InitContext {
	t.Helper()
	ic := plugin.NewContext(t.Context(), set, map[string]string{propertyTTRPCAddress: "/run/x"})
	ic.Config = cfg
	return ic
}

// Whatever is wrong, CRI gets a controller, and Create tells what it is.
func TestInitNeverFails(t *testing.T) {
	base := func() *config.Config {
		c := config.Default()
		c.StateDir, c.CacheDir = t.TempDir(), t.TempDir()
		return c
	}
	for name, tc := range map[string]struct {
		cfg  any
		want []string
	}{
		"no plugins, no kernel": {base(), []string{"kernel = ", "image = ", "containerd's metadata"}},
		"wrong everything": {func() any {
			c := base()
			c.VMM, c.StateDir, c.DefaultMemory = "xen", "relative", "1"
			return c
		}(), []string{`vmm = "xen"`, `state_dir = "relative"`, `default_memory = "1"`}},
		"no hypervisor": {func() any {
			c := base()
			c.VMM, c.QEMUBinary = "qemu", "/nonexistent/qemu"
			return c
		}(), []string{`qemu_binary = "/nonexistent/qemu"`}},
		"a directory that cannot be made": {func() any {
			c := base()
			c.CacheDir = "/proc/nonexistent"
			return c
		}(), []string{"/proc/nonexistent"}},
		"no configuration":        {nil, []string{"configuration is a"}},
		"another's configuration": {&struct{}{}, []string{"configuration is a"}},
	} {
		t.Run(name, func(t *testing.T) {
			ic := initContext(t, plugin.NewPluginSet(), tc.cfg)
			p, err := initController(ic)
			require.NoError(t, err)
			c, ok := p.(sandbox.Controller)
			require.True(t, ok)
			err = c.Create(namespaces.WithNamespace(t.Context(), "k8s.io"), sandbox.Sandbox{ID: "a"})
			require.Error(t, err)
			require.Equal(t, "false", ic.Meta.Exports["ready"])
			for _, w := range tc.want {
				require.ErrorContains(t, err, w)
				require.Contains(t, ic.Meta.Exports["reason"], w)
			}
		})
	}
}

func TestADirectoryIsOneContainerds(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "a", "b")
	f, err := lockDir(dir)
	require.NoError(t, err)
	_, err = lockDir(dir)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.ErrorContains(t, err, "in use by another containerd")
	require.NoError(t, f.Close())
	f, err = lockDir(dir)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	require.NoError(t, os.RemoveAll(dir))
}

// Recovery removes what it does not know, so a directory of others is not taken.
func TestADirectoryOfOthersIsLeftAlone(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	require.NoError(t, os.Mkdir(filepath.Join(dir, "lost+found"), 0o700))
	theirs := filepath.Join(dir, "theirs")
	require.NoError(t, os.Mkdir(theirs, 0o700))
	for range 2 {
		_, err := lockDir(dir)
		require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
		require.ErrorContains(t, err, dir+" is not empty (theirs)")
	}
	require.NoError(t, os.Remove(theirs))
	f, err := lockDir(dir)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	require.NoError(t, os.Mkdir(theirs, 0o700))
	f, err = lockDir(dir)
	require.NoError(t, err, "it is ours")
	require.NoError(t, f.Close())
}

func TestTheHostServiceNeedsItsController(t *testing.T) {
	t.Parallel()
	set := plugin.NewPluginSet()
	ic := initContext(t, set, nil)
	_, err := initHostService(ic)
	require.ErrorIs(t, err, plugin.ErrSkipPlugin)

	r := plugin.Registration{Type: sandboxControllerPlugin, ID: ID, InitFn: func(*plugin.InitContext) (any, error) {
		return controller.New(controller.Options{}), nil
	}}
	require.NoError(t, set.Add(r.Init(ic)))
	p, err := initHostService(ic)
	require.NoError(t, err)
	server, err := ttrpc.NewServer()
	require.NoError(t, err)
	defer server.Close()
	registrar, ok := p.(interface{ RegisterTTRPC(*ttrpc.Server) error })
	require.True(t, ok)
	require.NoError(t, registrar.RegisterTTRPC(server))
}
