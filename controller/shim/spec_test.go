// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"context"
	"fmt"
	"testing"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
)

// criSpec is what CRI makes for a container of a pod with the pid sandboxPid.
func criSpec(t testing.TB, args ...string) *specs.Spec {
	t.Helper()
	if len(args) == 0 {
		args = []string{"sleep"}
	}
	ctx := namespaces.WithNamespace(context.Background(), "k8s.io")
	spec, err := oci.GenerateSpec(ctx, nil, &containers.Container{ID: "c"}, oci.WithoutRunMount, oci.WithProcessArgs(args...))
	require.NoError(t, err)
	for i, ns := range spec.Linux.Namespaces {
		name := map[specs.LinuxNamespaceType]string{
			specs.NetworkNamespace: "net", specs.IPCNamespace: "ipc", specs.UTSNamespace: "uts",
		}[ns.Type]
		if name != "" {
			spec.Linux.Namespaces[i].Path = fmt.Sprintf("/proc/%d/ns/%s", sandboxPid, name)
		}
	}
	return spec
}
