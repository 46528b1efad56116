// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package prebuild

import (
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/opencontainers/go-digest"

	"github.com/cloudhv/containerd-cloudhv/controller/config"
)

// wanted are the snapshotters for which the image of a name should have its file
// system made. all are those there are, and used what pods have run.
func wanted(policy string, used []use, all []string, namespace, name string) []string {
	if isID(name) {
		return nil // the image has another name, with an event of its own
	}
	switch policy {
	case config.PrebuildAlways:
		return all
	case config.PrebuildUsed:
		repo := repository(name)
		var of []string
		for _, u := range used {
			if repo != "" && u.Namespace == namespace && u.Repository == repo {
				of = append(of, u.Snapshotter)
			}
		}
		return of
	default:
		return nil
	}
}

// repository is the part of an image's name that its versions share, without tag
// and digest; empty if the name has none, or one of unreasonable length.
func repository(name string) string {
	ref, err := reference.Parse(name)
	if err != nil || len(ref.Locator) > maxRepository {
		return ""
	}
	return ref.Locator
}

// isID is true for the name under which CRI keeps an image by its ID.
func isID(name string) bool {
	_, err := digest.Parse(name)
	return err == nil
}
