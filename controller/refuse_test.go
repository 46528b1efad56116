// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/controller/config"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

func TestCreateRefuses(t *testing.T) {
	options := func(ns *runtime.NamespaceOption) *runtime.PodSandboxConfig {
		return &runtime.PodSandboxConfig{Linux: &runtime.LinuxPodSandboxConfig{
			SecurityContext: &runtime.LinuxSandboxSecurityContext{NamespaceOptions: ns},
		}}
	}
	for name, tc := range map[string]struct {
		id     string
		config any
		want   []string
	}{
		"host network":    {"a", options(&runtime.NamespaceOption{Network: runtime.NamespaceMode_NODE}), []string{"network = NODE", "hostNetwork"}},
		"host pid":        {"a", options(&runtime.NamespaceOption{Pid: runtime.NamespaceMode_NODE}), []string{"pid = NODE", "hostPID"}},
		"host ipc":        {"a", options(&runtime.NamespaceOption{Ipc: runtime.NamespaceMode_NODE}), []string{"ipc = NODE", "hostIPC"}},
		"user namespace":  {"a", options(&runtime.NamespaceOption{UsernsOptions: &runtime.UserNamespace{Mode: runtime.NamespaceMode_POD}}), []string{"userns_options.uids: 0 mappings", "userns_options.gids"}},
		"windows":         {"a", &runtime.PodSandboxConfig{Windows: &runtime.WindowsPodSandboxConfig{}}, []string{"windows"}},
		"annotation":      {"a", &runtime.PodSandboxConfig{Annotations: map[string]string{"io.cloudhv.default_vcpus": "x"}}, []string{"io.cloudhv.default_vcpus", `"x"`}},
		"sysctl":          {"a", &runtime.PodSandboxConfig{Linux: &runtime.LinuxPodSandboxConfig{Sysctls: map[string]string{"kernel.core_pattern": "|/x"}}}, []string{"linux.sysctls", "kernel.core_pattern"}},
		"too much memory": {"a", &runtime.PodSandboxConfig{Linux: &runtime.LinuxPodSandboxConfig{Resources: &runtime.LinuxContainerResources{MemoryLimitInBytes: 3 << 30}}}, []string{"max_memory"}},
		"other options":   {"a", &runtime.ContainerConfig{}, []string{"PodSandboxConfig"}},
		"id with a slash": {"../a", &runtime.PodSandboxConfig{}, []string{"sandbox ID"}},
		"id too long":     {strings.Repeat("a", 65), &runtime.PodSandboxConfig{}, []string{"sandbox ID"}},
		"no id":           {"", &runtime.PodSandboxConfig{}, []string{"sandbox ID"}},
		"our own name":    {damagedDir, &runtime.PodSandboxConfig{}, []string{"sandbox ID"}},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			err := n.Create(n.ctx(), sandbox.Sandbox{ID: tc.id}, sandbox.WithOptions(tc.config))
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			for _, w := range tc.want {
				require.ErrorContains(t, err, w)
			}
			n.requireNothing()
		})
	}
	t.Run("all together", func(t *testing.T) {
		n := newNode(t)
		pc := options(&runtime.NamespaceOption{Network: runtime.NamespaceMode_NODE, Pid: runtime.NamespaceMode_NODE})
		pc.Annotations = map[string]string{"io.cloudhv.nonsense": "1"}
		err := n.Create(n.ctx(), sandbox.Sandbox{ID: "a"}, sandbox.WithOptions(pc))
		for _, w := range []string{"hostNetwork", "hostPID", "io.cloudhv.nonsense"} {
			require.ErrorContains(t, err, w)
		}
	})
	t.Run("twice", func(t *testing.T) {
		n := newNode(t)
		require.NoError(t, n.create("a"))
		require.ErrorIs(t, n.create("a"), errdefs.ErrAlreadyExists)
		require.NoError(t, n.Shutdown(n.ctx(), "a"))
		n.requireNothing()
	})
	t.Run("without a namespace", func(t *testing.T) {
		n := newNode(t)
		require.ErrorIs(t, n.Create(context.Background(), sandbox.Sandbox{ID: "a"}), errdefs.ErrFailedPrecondition)
	})
}

func TestAnUnfitController(t *testing.T) {
	why := errors.New("no hypervisor here, because of reasons")
	for name, c := range map[string]*Controller{
		"with a reason":    New(Options{Unfit: fmt.Errorf("%w: %w", why, errdefs.ErrFailedPrecondition)}),
		"without a driver": New(Options{Settings: newNode(t).cfg}),
	} {
		t.Run(name, func(t *testing.T) {
			require.ErrorIs(t, c.Unfit(), errdefs.ErrFailedPrecondition)
			err := c.Create(t.Context(), sandbox.Sandbox{ID: "a"})
			require.ErrorIs(t, err, c.Unfit())
			require.ErrorContains(t, err, c.Unfit().Error())
			require.NoError(t, c.Stop(t.Context(), "a"))
			_, err = c.Status(t.Context(), "a", false)
			require.ErrorIs(t, err, errdefs.ErrNotFound)
		})
	}
}

// QEMU starts no VM that could grow beyond what an emulated processor addresses.
func TestALargeHostWithoutVirtualization(t *testing.T) {
	t.Parallel()
	for accelerator, want := range map[string]int64{softwareEmulation: maxEmulated, "kvm": 4 << 40} {
		settings := &config.Settings{MaxMemory: 4 << 40}
		c := New(Options{Settings: settings, Host: vmm.Host{Accelerator: accelerator}})
		require.Equal(t, want, c.cfg.MaxMemory, accelerator)
		require.Equal(t, int64(4<<40), settings.MaxMemory, "the caller's own")
	}
}

// A node's budget for writable disks admits so many pods, and others when those have
// been removed.
func TestScratchBudget(t *testing.T) {
	n := newNode(t)
	n.cfg.ScratchBudget = 2*n.cfg.ScratchSize + 1
	n.run("a")
	n.run("b")
	err := n.Create(n.ctx(), sandbox.Sandbox{ID: "c"})
	require.ErrorIs(t, err, errdefs.ErrResourceExhausted)
	require.ErrorContains(t, err, `scratch_budget = "134217729B" has no room: 2 sandboxes have a writable disk of scratch_size = "64MiB" each`)
	require.ErrorIs(t, n.Create(n.ctx(), sandbox.Sandbox{ID: "b"}), errdefs.ErrAlreadyExists, "one that is asked for again needs no room")
	require.NoError(t, n.Stop(n.ctx(), "a"))
	require.ErrorIs(t, n.Create(n.ctx(), sandbox.Sandbox{ID: "c"}), errdefs.ErrResourceExhausted, "a stopped one has its disk")
	require.NoError(t, n.Shutdown(n.ctx(), "a"))
	n.run("c")
	for _, id := range []string{"b", "c"} {
		require.NoError(t, n.Shutdown(n.ctx(), id))
	}
	n.requireNothing()
}
