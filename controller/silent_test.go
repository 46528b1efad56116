// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

func TestConsoleTail(t *testing.T) {
	dir := t.TempDir()
	require.Empty(t, consoleTail(dir), "no console")
	path := filepath.Join(dir, vmm.ConsoleLog)
	require.NoError(t, os.WriteFile(path+vmm.RotatedSuffix, []byte("before\r\n"), 0o600))
	require.NoError(t, os.WriteFile(path, []byte("\x1b[31mred\r\n\npanic\n"), 0o600))
	require.Equal(t, "before\n?[31mred\npanic", consoleTail(dir))
	require.NoError(t, os.WriteFile(path, []byte(strings.Repeat("a line\n", 10_000)+"the last"), 0o600))
	tail := consoleTail(dir)
	require.LessOrEqual(t, len(tail), maxConsoleTail)
	require.Greater(t, len(tail), maxConsoleTail/2)
	require.True(t, strings.HasSuffix(tail, "a line\nthe last"))
	require.NoError(t, os.Remove(path))
	require.NoError(t, os.Symlink("/etc/passwd", path))
	require.NotContains(t, consoleTail(dir), "root:")
}
