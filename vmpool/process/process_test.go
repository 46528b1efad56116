// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package process

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// A process's files can be held beyond its end, those of one name.
func TestFiles(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "pipe")
	require.NoError(t, unix.Mkfifo(path, 0o600))
	pipe, err := os.OpenFile(path, os.O_RDWR, 0)
	require.NoError(t, err)
	cmd := exec.Command("sleep", "1000")
	cmd.ExtraFiles = []*os.File{pipe, pipe, pipe}
	require.NoError(t, cmd.Start())
	id, err := Identify(cmd.Process.Pid)
	require.NoError(t, err)
	h, err := id.Open()
	require.NoError(t, err)
	defer h.Close()
	require.Empty(t, h.Files("/nonexistent", 2))
	files := h.Files(path, 2)
	require.NoError(t, h.Kill(t.Context()))
	_ = cmd.Wait()
	require.NoError(t, pipe.Close())
	require.Len(t, files, 2, "no more than the limit")
	_, err = files[0].WriteString("x")
	require.NoError(t, err)
	_, err = files[1].Read(make([]byte, 1))
	require.NoError(t, err, "both are that pipe")
	for _, f := range files {
		require.NoError(t, f.Close())
	}
	require.Empty(t, h.Files(path, 2), "it has ended")
}
