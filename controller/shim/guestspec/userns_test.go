// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package guestspec

import (
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
)

func TestUserNamespace(t *testing.T) {
	t.Parallel()
	ours := fmt.Sprintf("/proc/%d/ns/user", testPid)
	one := []specs.LinuxIDMapping{{HostID: 65536, Size: 65536}}
	other := []specs.LinuxIDMapping{{HostID: 1 << 20, Size: 10}}
	for _, tc := range []struct {
		name, path string
		uids, gids []specs.LinuxIDMapping
		want       string // in the error
	}{
		{name: "the pod's", path: ours, uids: one, gids: other},
		{name: "another one", path: "/proc/1/ns/user", uids: one, gids: one, want: "linux.namespaces.user"},
		{name: "no mappings", path: ours, want: "linux.uidMappings"},
		{name: "no groups", path: ours, uids: one, want: "linux.gidMappings"},
		{name: "two mappings", path: ours, uids: append(one, other...), gids: one, want: "linux.uidMappings"},
		{name: "no root", path: ours, uids: one, gids: []specs.LinuxIDMapping{{ContainerID: 1, HostID: 65536, Size: 1}}, want: "linux.gidMappings"},
		{name: "nobody", path: ours, uids: []specs.LinuxIDMapping{{HostID: 65536}}, gids: one, want: "linux.uidMappings"},
		{name: "no namespace", uids: one, gids: one, want: "linux.uidMappings"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			host := fullSpec()
			if tc.path != "" {
				host.Linux.Namespaces = append(host.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace, Path: tc.path})
			}
			host.Linux.UIDMappings, host.Linux.GIDMappings = tc.uids, tc.gids
			got, err := Translate(host, "c", Pod{SandboxPid: testPid})
			if tc.want != "" {
				require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
				require.ErrorContains(t, err, tc.want)
				return
			}
			require.NoError(t, err)
			require.Equal(t, tc.uids, got.Spec.Linux.UIDMappings)
			require.Equal(t, tc.gids, got.Spec.Linux.GIDMappings)
			for _, ns := range got.Spec.Linux.Namespaces {
				require.NotEqual(t, specs.UserNamespace, ns.Type, "it is the agent's to add")
			}
		})
	}
}

func TestIDMappedMounts(t *testing.T) {
	t.Parallel()
	ids := []specs.LinuxIDMapping{{HostID: 65536, Size: 1000}, {ContainerID: 1000, HostID: 1 << 20, Size: 1}}
	for _, tc := range []struct {
		name  string
		mount specs.Mount
		want  string // in the error
	}{
		{name: "bind", mount: specs.Mount{Type: "bind", Source: "/a", Destination: "/b", Options: []string{"rbind"}, UIDMappings: ids, GIDMappings: ids}},
		{name: "users only", mount: specs.Mount{Type: "bind", Source: "/a", Destination: "/b", UIDMappings: ids}, want: `mount "/b" gidMappings`},
		{name: "groups only", mount: specs.Mount{Type: "bind", Source: "/a", Destination: "/b", GIDMappings: ids}, want: `mount "/b" uidMappings`},
		{name: "no bind", mount: specs.Mount{Type: "tmpfs", Destination: "/b", UIDMappings: ids, GIDMappings: ids}, want: `mount "/b" uidMappings`},
		{name: "too many", mount: specs.Mount{
			Type: "bind", Source: "/a", Destination: "/b", UIDMappings: ids, GIDMappings: make([]specs.LinuxIDMapping, maxIDMappings+1),
		}, want: `mount "/b" gidMappings is "341 mappings"`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			host := fullSpec()
			host.Mounts = []specs.Mount{tc.mount}
			got, err := Translate(host, "c", Pod{SandboxPid: testPid})
			if tc.want != "" {
				require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
				require.ErrorContains(t, err, tc.want)
				return
			}
			require.NoError(t, err)
			require.Equal(t, []specs.Mount{tc.mount}, got.Spec.Mounts)
		})
	}
}
