// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package config

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// inWords writes a size as the documents do: 64 MiB.
func inWords(n int64) string {
	size := FormatSize(n)
	unit := strings.TrimLeft(size, "0123456789")
	return strings.TrimSuffix(size, unit) + " " + unit
}

// Every bound is documented as it is checked, in its option's row.
func TestBoundsAreDocumented(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../docs/configuration.md")
	require.NoError(t, err)
	rows := map[string]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\|.*$").FindAllStringSubmatch(string(text), -1) {
		rows[row[1]] = row[0]
	}
	atLeast := func(n int64) string { return "at least " + inWords(n) }
	for key, want := range map[string]string{
		"default_vcpus":             fmt.Sprintf("at most %d", vmm.MaxVCPUs),
		"max_vcpus":                 fmt.Sprintf("at most %d;", vmm.MaxVCPUs),
		"base_memory":               atLeast(minBaseMemory),
		"default_memory":            atLeast(minBaseMemory),
		"scratch_size":              atLeast(minScratch),
		"console_log_limit":         atLeast(minConsole),
		"rootfs_builder.memory":     atLeast(minBuilder),
		"rootfs_builder.image_size": atLeast(minScratch),
		"rootfs_builder.parallel":   fmt.Sprintf("at most %d |", maxBuilderParallel),
		"boot_parallel":             fmt.Sprintf("at most %d;", maxBootParallel),
		"state_dir":                 fmt.Sprintf("at most %d bytes", MaxStateDirLen),
	} {
		require.Contains(t, rows[key], want, key)
	}
	require.Contains(t, string(text), "memory are multiples of "+inWords(Granule))
	bounds := regexp.MustCompile("From `([^`]+)` to `([^`]+)`").FindStringSubmatch(string(text))
	require.Len(t, bounds, 3)
	for i, want := range []time.Duration{minTimeout, maxTimeout} {
		got, err := time.ParseDuration(bounds[i+1])
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
}
