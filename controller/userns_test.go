// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"math"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

func usernsPod(u *runtime.UserNamespace) *runtime.PodSandboxConfig {
	return &runtime.PodSandboxConfig{Linux: &runtime.LinuxPodSandboxConfig{SecurityContext: &runtime.LinuxSandboxSecurityContext{
		NamespaceOptions: &runtime.NamespaceOption{UsernsOptions: u},
	}}}
}

func TestUserNamespace(t *testing.T) {
	t.Parallel()
	mapping := func(container, host, length uint32) []*runtime.IDMapping {
		return []*runtime.IDMapping{{ContainerId: container, HostId: host, Length: length}}
	}
	good := mapping(0, 65536, 65536)
	const pod = runtime.NamespaceMode_POD
	for name, tc := range map[string]struct {
		options *runtime.UserNamespace
		want    *guestv1.UserNamespace
		refusal []string
	}{
		"nothing said": {},
		"the node's":   {options: &runtime.UserNamespace{Mode: runtime.NamespaceMode_NODE}},
		"the pod's": {
			options: &runtime.UserNamespace{Mode: pod, Uids: good, Gids: mapping(0, 1<<20, 1)},
			want: &guestv1.UserNamespace{
				Uids: &guestv1.IDMapping{First: 65536, Size: 65536}, Gids: &guestv1.IDMapping{First: 1 << 20, Size: 1},
			},
		},
		"up to the last ID": {
			options: &runtime.UserNamespace{Mode: pod, Uids: mapping(0, math.MaxUint32-1, 1), Gids: good},
			want: &guestv1.UserNamespace{
				Uids: &guestv1.IDMapping{First: math.MaxUint32 - 1, Size: 1}, Gids: &guestv1.IDMapping{First: 65536, Size: 65536},
			},
		},
		"the container's": {options: &runtime.UserNamespace{Mode: runtime.NamespaceMode_CONTAINER, Uids: good, Gids: good}, refusal: []string{"mode = CONTAINER", "want POD"}},
		"a target's":      {options: &runtime.UserNamespace{Mode: runtime.NamespaceMode_TARGET, Uids: good, Gids: good}, refusal: []string{"mode = TARGET", "want POD"}},
		"no mapping":      {options: &runtime.UserNamespace{Mode: pod}, refusal: []string{"userns_options.uids: 0 mappings", "userns_options.gids: 0 mappings"}},
		"two mappings":    {options: &runtime.UserNamespace{Mode: pod, Uids: append(mapping(0, 1, 1), mapping(1, 5, 1)...), Gids: good}, refusal: []string{"userns_options.uids: 2 mappings: want one"}},
		"an empty one":    {options: &runtime.UserNamespace{Mode: pod, Uids: good, Gids: []*runtime.IDMapping{nil}}, refusal: []string{"userns_options.gids"}},
		"no length":       {options: &runtime.UserNamespace{Mode: pod, Uids: good, Gids: mapping(0, 65536, 0)}, refusal: []string{"userns_options.gids: length = 0: want at least 1"}},
		"no root":         {options: &runtime.UserNamespace{Mode: pod, Uids: mapping(1, 65536, 1), Gids: good}, refusal: []string{"userns_options.uids: container_id = 1: want 0"}},
		"beyond the IDs":  {options: &runtime.UserNamespace{Mode: pod, Uids: mapping(0, math.MaxUint32-1, 2), Gids: good}, refusal: []string{"host_id = 4294967294 with length = 2"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := userNamespace(usernsPod(tc.options))
			for _, w := range tc.refusal {
				require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
				require.ErrorContains(t, err, w)
			}
			if tc.refusal == nil {
				require.NoError(t, err)
			}
			require.True(t, proto.Equal(tc.want, got), "%v", got)
		})
	}
}
