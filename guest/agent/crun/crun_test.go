// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package crun

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

func TestParseLog(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ name, log, want string }{
		{"empty", "", ""},
		{"no json", "oops\n", ""},
		{"one", `{"msg":"no such file ","level":"error","time":"x"}` + "\n", "no such file"},
		{"last error counts", `{"msg":"a","level":"error"}` + "\n" + `{"msg":"b","level":"error"}` + "\n" + `{"msg":"c","level":"warning"}`, "b"},
		{"cut", `{"msg":"` + strings.Repeat("x", 2*maxMessage) + `","level":"error"}`, strings.Repeat("x", maxMessage)},
		{"torn", `{"msg":"a","level":"error"}` + "\n" + `{"msg":"b","lev`, "a"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			require.Equal(t, tc.want, parseLog(strings.NewReader(tc.log)))
		})
	}
}

func FuzzParseLog(f *testing.F) {
	f.Add(`{"msg":"a","level":"error"}`)
	f.Fuzz(func(t *testing.T, s string) {
		if got := parseLog(strings.NewReader(s)); len(got) > maxMessage+3 {
			t.Fatalf("message of %d bytes", len(got))
		}
	})
}

func TestFailure(t *testing.T) {
	t.Parallel()
	log := filepath.Join(t.TempDir(), "log")
	require.NoError(t, os.WriteFile(log, []byte(`{"msg":"executable file `+"`x`"+` not found","level":"error"}`), 0o600))
	cause := errors.New("exit status 1")
	err := failure("create", log, cause)
	require.EqualError(t, err, "OCI runtime create failed: executable file `x` not found")
	require.ErrorIs(t, err, cause)
	require.True(t, errdefs.IsUnknown(errdefs.Resolve(err)))
	require.ErrorIs(t, failure("start", log+"-none", cause), cause)
}

// A container's first process is let go by a byte, and crun is run where that fails.
func TestStart(t *testing.T) {
	t.Parallel()
	root, bundle := t.TempDir(), t.TempDir()
	fifo := filepath.Join(root, "c", "exec.fifo")
	require.NoError(t, os.Mkdir(filepath.Dir(fifo), 0o700))
	require.NoError(t, unix.Mkfifo(fifo, 0o600))
	r := Runtime{Command: "/bin/false", Root: root}
	require.Error(t, r.Start(t.Context(), "c", bundle), "nobody waits: crun is asked")
	require.FileExists(t, fifo)

	waits, err := os.OpenFile(fifo, os.O_RDONLY|unix.O_NONBLOCK, 0)
	require.NoError(t, err)
	defer waits.Close()
	require.NoError(t, r.Start(t.Context(), "c", bundle))
	got := make([]byte, 2)
	n, err := waits.Read(got)
	require.NoError(t, err)
	require.Equal(t, 1, n)
	require.NoFileExists(t, fifo)
	require.Error(t, r.Start(t.Context(), "c", bundle), "it runs")
}
