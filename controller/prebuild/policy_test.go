// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package prebuild

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/controller/config"
)

const (
	someHex = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	someID  = "sha256:" + someHex
)

func TestRepository(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]string{
		"docker.io/library/redis:7":                        "docker.io/library/redis",
		"docker.io/library/redis":                          "docker.io/library/redis",
		"localhost:5000/a/b:1":                             "localhost:5000/a/b",
		"localhost:5000/a/b@" + someID:                     "localhost:5000/a/b",
		"localhost:5000/a/b:1@" + someID:                   "localhost:5000/a/b",
		"r/a" + strings.Repeat("a", maxRepository-3):       "r/a" + strings.Repeat("a", maxRepository-3),
		"r/a" + strings.Repeat("a", maxRepository-3) + "b": "",
		someID: "",
		"":     "",
		"%zz":  "",
	} {
		require.Equal(t, want, repository(name), name)
	}
}

func TestWanted(t *testing.T) {
	t.Parallel()
	all := []string{"native", "overlayfs"}
	used := []use{
		{Namespace: "k8s.io", Snapshotter: "overlayfs", Repository: "r/a"},
		{Namespace: "k8s.io", Snapshotter: "native", Repository: "r/both"},
		{Namespace: "k8s.io", Snapshotter: "overlayfs", Repository: "r/both"},
		{Namespace: "default", Snapshotter: "overlayfs", Repository: "r/default"},
	}
	for _, tc := range []struct {
		policy, namespace, name string
		want                    []string
	}{
		{config.PrebuildUsed, "k8s.io", "r/a:1", []string{"overlayfs"}},
		{config.PrebuildUsed, "k8s.io", "r/a@" + someID, []string{"overlayfs"}},
		{config.PrebuildUsed, "k8s.io", "r/both:2", all},
		{config.PrebuildUsed, "k8s.io", "r/ab:1", nil},
		{config.PrebuildUsed, "k8s.io", "r/default:1", nil},
		{config.PrebuildUsed, "default", "r/default:1", []string{"overlayfs"}},
		{config.PrebuildUsed, "k8s.io", someID, nil},
		{config.PrebuildUsed, "k8s.io", "a name that is none", nil},
		{config.PrebuildAlways, "k8s.io", "r/c:1", all},
		{config.PrebuildAlways, "other", "a name that is none", all},
		{config.PrebuildAlways, "k8s.io", someID, nil},
		{config.PrebuildNever, "k8s.io", "r/a:1", nil},
	} {
		require.Equal(t, tc.want, wanted(tc.policy, used, all, tc.namespace, tc.name), "%+v", tc)
	}
}
