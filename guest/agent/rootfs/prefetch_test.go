// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package rootfs

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestCandidates(t *testing.T) {
	t.Parallel()
	env := []string{"PATH=/early", "X=1", "PATH=/bin:usr/bin:"}
	require.Equal(t, []string{"/bin/sh", "/usr/bin/sh", "/sh"}, candidates("sh", "/work", env), "the last PATH counts")
	require.Equal(t, []string{"/opt/x"}, candidates("/opt/x", "/work", env))
	require.Equal(t, []string{"/work/x"}, candidates("./x", "/work", env))
	require.Equal(t, []string{"/x"}, candidates("../../x", "/work", nil))
	require.Empty(t, candidates("sh", "/", nil))
}

func TestInterpreter(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct{ head, want string }{
		"a script":           {"#!/bin/sh -e\nexit\n", "/bin/sh"},
		"a space":            {"#! /usr/bin/env python3\n", "/usr/bin/env"},
		"nothing said":       {"#!\n", ""},
		"a text":             {"echo\n", ""},
		"empty":              {"", ""},
		"half an ELF header": {"\x7fELF\x02\x01\x01", ""},
		"wild offsets":       {"\x7fELF\x02\x01\x01" + string(bytes.Repeat([]byte{0xff}, 200)), ""},
	} {
		require.Equal(t, tc.want, interpreter(bytes.NewReader([]byte(tc.head))), name)
	}
	f, err := os.Open("/bin/sh")
	require.NoError(t, err)
	defer f.Close()
	require.Contains(t, interpreter(f), "/ld-linux", "the host's shell is dynamic")
}

func FuzzInterpreter(f *testing.F) {
	f.Add([]byte("#!/bin/sh"))
	f.Fuzz(func(t *testing.T, data []byte) {
		require.LessOrEqual(t, len(interpreter(bytes.NewReader(data))), maxInterpreter)
	})
}

// Nothing outside the root is looked at, and a FIFO or a loop holds nobody up.
func TestPrefetchStaysWithin(t *testing.T) {
	t.Parallel()
	outside, root := t.TempDir(), t.TempDir()
	dir := func() int {
		fd, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		require.NoError(t, err)
		t.Cleanup(func() { _ = unix.Close(fd) })
		return fd
	}()
	require.NoError(t, os.WriteFile(filepath.Join(outside, "secret"), []byte("x"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(root, "script"), []byte("#!/loop\n"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(root, "loop"), []byte("#!/loop\n"), 0o700))
	require.NoError(t, os.Symlink("/script", filepath.Join(root, "link")))
	require.NoError(t, os.Symlink(filepath.Join(outside, "secret"), filepath.Join(root, "out")))
	require.NoError(t, os.Symlink("../../../../../../.."+outside+"/secret", filepath.Join(root, "up")))
	require.NoError(t, unix.Mkfifo(filepath.Join(root, "fifo"), 0o600))
	for name, want := range map[string]bool{"/script": true, "/link": true, "/out": false, "/up": false, "/fifo": false, "/none": false, "/": false} {
		require.Equal(t, want, prefetch(dir, name, maxHops), name)
	}
	Prefetch(root, "/", nil, nil)
	Prefetch(filepath.Join(root, "none"), "/", []string{"x"}, nil)
	Prefetch(root, "/", []string{"script"}, []string{"PATH=/bin:/"})
}
