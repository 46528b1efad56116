// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
)

func TestWrap(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name, in string
		width    int
		want     []string
	}{
		{"empty", "", 10, []string{""}},
		{"fits", "a pod", 10, []string{"a pod"}},
		{"breaks at spaces", "a pod in a machine", 7, []string{"a pod", "in a", "machine"}},
		{"keeps a long word", "hypervisor x", 5, []string{"hypervisor", "x"}},
		{"counts runes", "äöü äöü", 7, []string{"äöü äöü"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			require.Equal(t, tc.want, wrap(tc.in, tc.width))
		})
	}
}

func TestPrintable(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ name, in, want string }{
		{"plain", "uname -r", "uname -r"},
		{"escape sequences lose their teeth", "\x1b[2Jx\r\n", "[2Jx"},
		{"C1 controls", "a\u009bb", "ab"},
		{"tabs", "a\tb", "a b"},
		{"not UTF-8", "a\xffb", "a?b"},
		{"long", "0123456789abcdefghij", "0123456789abcde~"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			require.Equal(t, tc.want, printable(tc.in, 16))
		})
	}
}

func TestBar(t *testing.T) {
	t.Parallel()
	require.Equal(t, "#####     ", bar(0, 50, 100, 10))
	require.Equal(t, "     #####", bar(50, 50, 100, 10))
	require.Equal(t, "         #", bar(100, 0, 100, 10), "what takes no time is seen all the same")
	require.Empty(t, bar(0, 0, 0, 10))
}

func TestTimedAligns(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	p := &printer{w: &b}
	boom := errors.New("boom")
	require.NoError(t, p.timed("crictl pods", func() error { return nil }))
	require.NoError(t, p.timed(strings.Repeat("long ", 40), func() error { return nil }))
	require.ErrorIs(t, p.timed("crictl ps", func() error { return boom }), boom)
	lines := strings.Split(strings.TrimRight(b.String(), "\n"), "\n")
	require.Len(t, lines, 3)
	require.Equal(t, utf8.RuneCountInString(lines[0]), utf8.RuneCountInString(lines[1]))
	require.NotContains(t, b.String(), "\x1b", "no colour where there is no terminal")
	require.Contains(t, lines[2], "failed")
}

func TestFactsAlign(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	p := &printer{w: &b}
	p.fact("accelerator", strings.Repeat("because ", 20))
	for line := range strings.Lines(b.String()) {
		require.LessOrEqual(t, utf8.RuneCountInString(line), column+1)
	}
	require.Equal(t, 23, strings.Index(b.String(), "because"))
}

func TestSqueeze(t *testing.T) {
	t.Parallel()
	require.Equal(t, "POD ID   STATE\nabc      Ready\n", squeeze("POD ID              STATE\nabc                 Ready"))
}

func TestLeaks(t *testing.T) {
	t.Parallel()
	require.Equal(t, []string{"+1 process qemu", "+1 file run/<id>/record.json"}, leaks([]string{
		"+1 process qemu", "+1 file cache/images/<id>.erofs", "+1 16 MiB of cache/images/<id>.erofs", "+1 file run/<id>/record.json", "-1 goroutine x", "+1 open file y",
	}))
}
