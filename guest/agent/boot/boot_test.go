// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package boot

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestHasProjectQuota(t *testing.T) {
	t.Parallel()
	mkfs, err := exec.LookPath("mkfs.ext4")
	if err != nil {
		t.Skipf("needs mkfs.ext4: %v", err)
	}
	for name, tc := range map[string]struct {
		args []string
		want bool
	}{
		"plain":   {nil, false},
		"user":    {[]string{"-O", "quota", "-E", "quotatype=usrquota"}, false},
		"project": {[]string{"-O", "quota,project", "-E", "quotatype=prjquota"}, true},
	} {
		path := filepath.Join(t.TempDir(), name)
		require.NoError(t, os.WriteFile(path, nil, 0o600))
		require.NoError(t, os.Truncate(path, 16<<20))
		out, err := exec.CommandContext(t.Context(), mkfs, append(append([]string{"-q"}, tc.args...), path)...).CombinedOutput()
		require.NoError(t, err, "%s", out)
		got, err := hasProjectQuota(path)
		require.NoError(t, err)
		require.Equal(t, tc.want, got, name)
	}
	short := filepath.Join(t.TempDir(), "short")
	require.NoError(t, os.WriteFile(short, []byte("x"), 0o600))
	_, err = hasProjectQuota(short)
	require.Error(t, err)
}

func TestPreload(t *testing.T) {
	t.Parallel()
	self, err := os.Executable()
	require.NoError(t, err)
	require.NoError(t, Preload(self))
	require.ErrorIs(t, Preload(self+".none"), os.ErrNotExist)
	require.NotZero(t, Uptime())
}
