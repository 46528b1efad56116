// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package rootfs

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// imageOf is the topmost snapshot of the image that a container's snapshot lies on.
//
// That is its parent, except for a container in a user namespace by a snapshotter that
// maps no IDs: for such containerd copies the image, gives the copy's files to other
// owners, and lets the container lie on that. A VM maps the IDs itself, of the image.
func imageOf(ctx context.Context, sn snapshots.Snapshotter, container snapshots.Info) (string, error) {
	uids, gids := container.Labels[snapshots.LabelSnapshotUIDMapping], container.Labels[snapshots.LabelSnapshotGIDMapping]
	if container.Parent == "" || uids == "" && gids == "" {
		return container.Parent, nil
	}
	parent, err := sn.Stat(ctx, container.Parent)
	if err != nil {
		return "", fmt.Errorf("snapshot %q: %w", container.Parent, err)
	}
	copied, err := remappedName(parent.Parent, uids, gids)
	if err != nil {
		return "", fmt.Errorf("the ID mappings of snapshot %q: %w", container.Name, err)
	}
	if parent.Name == copied {
		return parent.Parent, nil
	}
	return parent.Name, nil
}

// remappedName is what containerd calls a copy of a snapshot that belongs to other owners:
// remappedSnapshot.ID of its client/snapshotter_opts_unix.go.
func remappedName(original, uids, gids string) (string, error) {
	var s struct {
		Parent string
		IDMap  struct{ UidMap, GidMap []specs.LinuxIDMapping } //nolint:revive,staticcheck // the names are containerd's
	}
	s.Parent = original
	for _, m := range []struct {
		label string
		to    *[]specs.LinuxIDMapping
	}{{uids, &s.IDMap.UidMap}, {gids, &s.IDMap.GidMap}} {
		for one := range strings.SplitSeq(m.label, ",") {
			var ids specs.LinuxIDMapping
			if _, err := fmt.Sscanf(one, "%d:%d:%d", &ids.ContainerID, &ids.HostID, &ids.Size); err != nil {
				return "", fmt.Errorf("%q is not CONTAINER:HOST:SIZE: %w", one, err)
			}
			*m.to = append(*m.to, ids)
		}
	}
	b, err := json.Marshal(s)
	if err != nil {
		return "", err
	}
	return digest.FromBytes(b).String(), nil
}
