// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/controller/annotation"
)

func TestAnnotations(t *testing.T) {
	t.Parallel()
	all := sizingConfig().Annotations
	type m = map[string]string
	for name, tc := range map[string]struct {
		annotations m
		allowed     []string
		want        overrides
	}{
		"none":   {nil, all, overrides{}},
		"others": {m{"kubernetes.io/x": "y", "io.cloudhvx": "z"}, all, overrides{}},
		"ours": {m{
			"io.cloudhv.default_vcpus": "2", "io.cloudhv.default_memory": "1GiB", "io.cloudhv.kernel_params": "a=b  c",
			"io.cloudhv.default_max_vcpus": "4", "io.cloudhv.default_maxmemory": "2GiB", "io.cloudhv.enable_virtio_mem": "false",
		}, all, overrides{vcpus: 2, memory: 1 << 30, maxVCPUs: 4, maxMemory: 2 << 30, fixedMemory: true, kernelParams: []string{"a=b", "c"}}},
		"kata's": {m{
			annotation.Kata + "default_vcpus": "1.5", annotation.Kata + "default_memory": "1024", annotation.Kata + "default_max_vcpus": "3",
			annotation.Kata + "default_maxmemory": "2048", annotation.Kata + "enable_virtio_mem": "true",
		}, all, overrides{vcpus: 2, memory: 1 << 30, maxVCPUs: 3, maxMemory: 2 << 30}},
		"the long form": {m{annotation.Long + "default_vcpus": "2", annotation.Long + "default_memory": "1024", annotation.Long + "memory_limit": "2048"},
			all, overrides{vcpus: 2, memory: 1 << 30, maxMemory: 2 << 30}},
		"ours win":            {m{annotation.Kata + "default_vcpus": "2", annotation.Long + "default_vcpus": "4", "io.cloudhv.default_vcpus": "3"}, all, overrides{vcpus: 3}},
		"the long form wins":  {m{annotation.Kata + "default_vcpus": "2", annotation.Long + "default_vcpus": "4"}, all, overrides{vcpus: 4}},
		"kata's that we lack": {m{annotation.Kata + "enable_iommu": "true"}, all, overrides{}},
		"one is allowed":      {m{"io.cloudhv.default_vcpus": "2"}, []string{"io.cloudhv.default_vcpus"}, overrides{vcpus: 2}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg := sizingConfig()
			cfg.Annotations = tc.allowed
			got, err := parseAnnotations(tc.annotations, cfg)
			require.NoError(t, err)
			got.said = nil
			require.Equal(t, tc.want, got)
		})
	}
}

// TestAnnotationsRefused: each names the annotation, its value and the range.
func TestAnnotationsRefused(t *testing.T) {
	t.Parallel()
	const vcpus, mibs = "from 1 to 4 (max_vcpus)", "MiB from 64 to 2048 (max_memory)"
	const sizes, most = `from "64MiB" to "2GiB" (max_memory)`, `from "128MiB" to "2GiB" (max_memory)`
	for _, tc := range []struct{ key, value, want string }{
		{"io.cloudhv.default_vcpus", "0", vcpus},
		{"io.cloudhv.default_vcpus", "-1", vcpus},
		{"io.cloudhv.default_vcpus", "4000", vcpus},
		{"io.cloudhv.default_vcpus", "1.5", vcpus},
		{"io.cloudhv.default_vcpus", "99999999999999999999", vcpus},
		{"io.cloudhv.default_vcpus", "", vcpus},
		{"io.cloudhv.default_max_vcpus", "0", vcpus},
		{"io.cloudhv.default_max_vcpus", "5", vcpus},
		{annotation.Kata + "default_vcpus", "4.5", vcpus},
		{annotation.Kata + "default_vcpus", "NaN", vcpus},
		{annotation.Kata + "default_vcpus", "-0.5", vcpus},
		{"io.cloudhv.default_memory", "-1", sizes},
		{"io.cloudhv.default_memory", "12Q", sizes},
		{"io.cloudhv.default_memory", "10TiB", sizes},
		{"io.cloudhv.default_memory", "10 TB", sizes},
		{"io.cloudhv.default_memory", "63MiB", sizes},
		{"io.cloudhv.default_memory", "9999999TiB", sizes},
		{"io.cloudhv.default_maxmemory", "127MiB", most},
		{"io.cloudhv.memory_limit", "3GiB", most},
		{annotation.Kata + "default_memory", "1GiB", mibs},
		{annotation.Kata + "default_memory", "63", mibs},
		{annotation.Long + "default_memory", "10485760", mibs},
		{"io.cloudhv.enable_virtio_mem", "perhaps", "true or false"},
		{"io.cloudhv.kernel_params", "a\nb", "printable"},
		{"io.cloudhv.vcpu", "2", "no such annotation; there are io.cloudhv.default_max_vcpus"},
		{annotation.Long + "vcpu", "2", "no such annotation"},
	} {
		t.Run(tc.key+"="+tc.value, func(t *testing.T) {
			t.Parallel()
			_, err := parseAnnotations(map[string]string{tc.key: tc.value}, sizingConfig())
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.ErrorContains(t, err, said{tc.key, tc.value}.String()+": ")
			require.ErrorContains(t, err, tc.want)
		})
	}
	cfg := sizingConfig()
	cfg.Annotations = []string{"io.cloudhv.default_memory"}
	_, err := parseAnnotations(map[string]string{"io.cloudhv.default_vcpus": "2", "io.cloudhv.default_memory": "y"}, cfg)
	require.ErrorContains(t, err, "does not allow")
	require.ErrorContains(t, err, `io.cloudhv.default_memory = "y"`, "all together")
}

// The names that a shim knows are those that are read here.
func TestAnnotationNames(t *testing.T) {
	t.Parallel()
	var read []string
	for name := range annotationParsers {
		read = append(read, annotation.Own+name)
	}
	slices.Sort(read)
	require.Equal(t, read, annotation.Names())
	for key, unknown := range map[string]bool{
		annotation.Own + annotation.VCPUs: false, annotation.Long + annotation.VCPUs: false, annotation.Kata + "any": false, "any": false,
		annotation.Own + "vcpus": true, annotation.Long + "vcpus": true, annotation.Own: true,
	} {
		require.Equal(t, unknown, annotation.Unknown(key), key)
	}
}
