// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"errors"
	"fmt"
	"math"

	"github.com/containerd/errdefs"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// userNamespace reads the user namespace that a pod asks for (hostUsers: false); nil is
// none. The guest makes it, with the IDs that kubelet has given to the pod on the host: so
// what CRI calls a host ID is an ID of the VM, and the same number in a volume.
func userNamespace(pc *runtime.PodSandboxConfig) (*guestv1.UserNamespace, error) {
	const where = "linux.security_context.namespace_options.userns_options."
	o := pc.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions()
	switch o.GetMode() {
	case runtime.NamespaceMode_NODE:
		return nil, nil
	case runtime.NamespaceMode_POD:
		if o == nil {
			return nil, nil
		}
	default:
		return nil, fmt.Errorf("%smode = %s: want POD, or NODE for none: %w", where, o.GetMode(), errdefs.ErrInvalidArgument)
	}
	uids, uidErr := idMapping(where+"uids", o.GetUids())
	gids, gidErr := idMapping(where+"gids", o.GetGids())
	if err := errors.Join(uidErr, gidErr); err != nil {
		return nil, err
	}
	return &guestv1.UserNamespace{Uids: uids, Gids: gids}, nil
}

// idMapping is the one mapping that CRI allows. Root has to be in it, as by runc.
func idMapping(field string, all []*runtime.IDMapping) (*guestv1.IDMapping, error) {
	refuse := func(what, want string) (*guestv1.IDMapping, error) {
		return nil, fmt.Errorf("%s: %s: want %s: %w", field, what, want, errdefs.ErrInvalidArgument)
	}
	if len(all) != 1 || all[0] == nil {
		return refuse(fmt.Sprintf("%d mappings", len(all)), "one")
	}
	m := all[0]
	switch {
	case m.GetContainerId() != 0:
		return refuse(fmt.Sprintf("container_id = %d", m.GetContainerId()), "0, as root has to be mapped")
	case m.GetLength() == 0:
		return refuse("length = 0", "at least 1")
	case uint64(m.GetHostId())+uint64(m.GetLength()) > math.MaxUint32:
		return refuse(fmt.Sprintf("host_id = %d with length = %d", m.GetHostId(), m.GetLength()),
			fmt.Sprintf("all of them below %d", uint32(math.MaxUint32)))
	}
	return &guestv1.IDMapping{First: m.GetHostId(), Size: m.GetLength()}, nil
}
