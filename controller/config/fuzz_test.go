// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package config

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/pelletier/go-toml/v2"
	"github.com/stretchr/testify/require"
)

// FuzzConfig reads any text as the plugin's section of containerd's configuration: what is
// taken is within the host, and what is not is refused with all that is wrong.
func FuzzConfig(f *testing.F) {
	golden, err := os.ReadFile(filepath.Join("testdata", "default.toml"))
	require.NoError(f, err)
	f.Add(string(golden))
	f.Add("default_memory = 'NaNGiB'\nmax_vcpus = -1\n[pool]\nmin = 1e400\n")
	f.Add("vmm = ['a', 7]\n[timeouts]\nboot = '-9223372036854775808ns'\n")
	f.Fuzz(func(t *testing.T, text string) {
		c := Default()
		if toml.Unmarshal([]byte(text), c) != nil {
			return
		}
		s, err := c.Validate(testHost)
		if err != nil {
			require.NotEmpty(t, err.Error())
			return
		}
		require.Positive(t, s.DefaultVCPUs)
		require.LessOrEqual(t, s.DefaultVCPUs, s.MaxVCPUs)
		require.Positive(t, s.DefaultMemory)
		require.LessOrEqual(t, s.DefaultMemory, s.MaxMemory)
		require.Positive(t, s.BootTimeout)
		require.Positive(t, s.ConsoleLogLimit)
		require.True(t, filepath.IsAbs(s.StateDir) && filepath.IsAbs(s.CacheDir))
	})
}

// FuzzSize reads any text as a size. What is one is written as the same.
func FuzzSize(f *testing.F) {
	for _, s := range []string{"0", "512MiB", "1.5GiB", "-1", "9223372036854775807", "8EiB", " 1KiB", "1e3"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		n, err := ParseSize(text)
		if err != nil {
			return
		}
		require.GreaterOrEqual(t, n, int64(0))
		again, err := ParseSize(FormatSize(n))
		require.NoError(t, err)
		require.Equal(t, n, again)
	})
}
