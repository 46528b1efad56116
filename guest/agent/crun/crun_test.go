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
