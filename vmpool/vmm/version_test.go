// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmm

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Whatever binary somebody has named, it costs little time and memory, and the error names it.
func TestVersion(t *testing.T) {
	t.Parallel()
	script := func(text string) string {
		path := filepath.Join(t.TempDir(), "vmm")
		require.NoError(t, os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o700))
		return path
	}
	out, err := Version(t.Context(), script(`echo "version $1"`), "--version")
	require.NoError(t, err)
	require.Equal(t, "version --version\n", out)
	for name, tc := range map[string]struct{ script, says string }{
		"fails":              {"exit 3", "exit status 3"},
		"prints without end": {"exec yes", "it prints more than 65536 bytes"},
		"complains for ever": {"exec yes >&2", "it prints more than 65536 bytes"},
		"never answers":      {"exec sleep 100", "no answer within 5s"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			began, path := time.Now(), script(tc.script)
			_, err := Version(t.Context(), path, "--version")
			require.ErrorContains(t, err, path+" --version: "+tc.says)
			require.Less(t, time.Since(began), 2*versionLimit)
		})
	}
}

// An accelerator is of use only if a VMM may open its device.
func TestOpens(t *testing.T) {
	t.Parallel()
	unusable, forbidden := errors.New("unusable"), errors.New("forbidden")
	asked := ""
	opens := func(device string) error {
		asked = device
		return forbidden
	}
	usable := func() error { return nil }
	require.NoError(t, Opens(usable, AccelKVM, nil)())
	require.ErrorIs(t, Opens(usable, AccelKVM, opens)(), forbidden)
	require.Equal(t, "/dev/kvm", asked)
	require.ErrorIs(t, Opens(usable, AccelMSHV, opens)(), forbidden)
	require.Equal(t, "/dev/mshv", asked)
	require.ErrorIs(t, Opens(func() error { return unusable }, AccelKVM, opens)(), unusable)
}
