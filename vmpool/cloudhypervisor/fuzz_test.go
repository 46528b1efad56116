// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package cloudhypervisor

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// FuzzSnapshotConfig reads any file as the configuration that a template's hypervisor has
// written: what is taken has the RAM private and no path of the template's.
func FuzzSnapshotConfig(f *testing.F) {
	f.Add([]byte(`{"big":18446744073709551615,"memory":{"thp":false,"zones":[{"id":"ram","shared":true}]},"payload":{"kernel":"/x/kernel"}}`))
	f.Add([]byte(`{"memory":{"zones":[null]}}`))
	f.Add([]byte(`[]`))
	path := filepath.Join(f.TempDir(), configName)
	f.Fuzz(func(t *testing.T, data []byte) {
		require.NoError(t, os.WriteFile(path, data, 0o600))
		if editConfig(path) != nil {
			return
		}
		text, err := os.ReadFile(path)
		require.NoError(t, err)
		var got struct {
			Memory struct {
				THP   bool
				Zones []struct{ Shared bool }
			}
			Payload struct{ Kernel string }
		}
		require.NoError(t, json.Unmarshal(text, &got))
		require.Len(t, got.Memory.Zones, 1)
		require.False(t, got.Memory.Zones[0].Shared || got.Memory.THP)
		require.Equal(t, kernelLink, got.Payload.Kernel)
	})
}

// FuzzVersion reads whatever a program prints as its version.
func FuzzVersion(f *testing.F) {
	f.Add("cloud-hypervisor v53.0\n")
	f.Add("cloud-hypervisor v\x00\n\n")
	f.Fuzz(func(t *testing.T, out string) {
		version, err := parseVersion(out)
		if err == nil {
			require.NotEmpty(t, version)
		}
	})
}
