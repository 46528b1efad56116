// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package disk

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

func TestValidSerial(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]bool{
		"scratch": true, "a": true, "0123456789abcdef0123": true, "x-1": true,
		"": false, "0123456789abcdef01234": false, "A": false, "a/b": false, "a b": false, "..": false, "a\n": false,
	} {
		require.Equal(t, want, ValidSerial(s), "%q", s)
	}
}

func TestWait(t *testing.T) {
	t.Parallel()
	d := t.TempDir()
	f := Finder{Sys: filepath.Join(d, "sys"), Dev: filepath.Join(d, "dev")}
	write := func(path, data string) {
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, []byte(data), 0o644))
	}
	write(f.Sys+"/block/vda/serial", "")
	write(f.Sys+"/block/loop0/size", "0")
	write(f.Sys+"/block/vdb/serial", "scratch\n")
	write(f.Dev+"/vdb", "")
	write(f.Sys+"/block/vdc/serial", "no-node-yet")

	node, err := f.Wait(t.Context(), "scratch", time.Second)
	require.NoError(t, err)
	require.Equal(t, f.Dev+"/vdb", node)

	for _, serial := range []string{"other", "no-node-yet"} {
		_, err = f.Wait(t.Context(), serial, 10*time.Millisecond)
		require.True(t, errdefs.IsNotFound(err), "%v", err)
	}
	_, err = f.Wait(t.Context(), strings.Repeat("x", 30), time.Second)
	require.True(t, errdefs.IsInvalidArgument(err), "%v", err)
}

// What can be written has to be written back at the end, whatever else is said of it.
func TestWritable(t *testing.T) {
	t.Parallel()
	sys := t.TempDir()
	for name, files := range map[string]map[string]string{
		"vda": {"ro": "1\n", "serial": "root"},
		"vdb": {"ro": "0\n", "serial": "scratch\x00"},
		"vdc": {"ro": "0\n"},
		"vdd": {},
	} {
		require.NoError(t, os.MkdirAll(filepath.Join(sys, "block", name), 0o755))
		for file, content := range files {
			require.NoError(t, os.WriteFile(filepath.Join(sys, "block", name, file), []byte(content), 0o600))
		}
	}
	got, err := Finder{Sys: sys}.Writable()
	require.NoError(t, err)
	require.ElementsMatch(t, []string{"scratch", ""}, got)
	_, err = Finder{Sys: filepath.Join(sys, "none")}.Writable()
	require.Error(t, err)
}
