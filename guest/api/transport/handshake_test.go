// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package transport

import (
	"bufio"
	"bytes"
	"io"
	"testing"
	"testing/iotest"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestScan(t *testing.T) {
	t.Parallel()
	n := nonce{1, 2, 3}
	tests := map[string]struct {
		stale string
		want  error
	}{
		"clean":                   {},
		"garbage":                 {stale: "old session's bytes"},
		"half a magic":            {stale: magic[:7]},
		"magic's first byte":      {stale: magic[:1]},
		"another answer":          {stale: magic + "0123456789abcdef"},
		"another answer, torn":    {stale: magic + "01234"},
		"long":                    {stale: string(bytes.Repeat([]byte(magic[:4]), 30_000))},
		"more than is skipped":    {stale: string(make([]byte, maxStale+3*maxFrame)), want: errNoAnswer},
		"exactly a buffer's size": {stale: string(make([]byte, maxFrame))},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			in := io.MultiReader(bytes.NewReader([]byte(tc.stale)), bytes.NewReader(answer(n)), bytes.NewReader([]byte("rest")))
			if len(tc.stale) < 1000 {
				in = iotest.OneByteReader(in)
			}
			r := bufio.NewReaderSize(in, maxFrame)
			err := scanAnswer(r, n)
			if tc.want != nil {
				require.ErrorIs(t, err, tc.want)
				return
			}
			require.NoError(t, err)
			rest, err := io.ReadAll(r)
			require.NoError(t, err)
			assert.Equal(t, "rest", string(rest))
		})
	}
	_, err := scanPreamble(bufio.NewReader(bytes.NewReader(preamble(n)[:padSize+20])))
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
}

func FuzzScanAnswer(f *testing.F) {
	n := nonce{9, 8, 7}
	f.Add([]byte("stale"), 3)
	f.Add([]byte(magic), 1)
	f.Add(answer(n)[:20], 20)
	f.Fuzz(func(t *testing.T, stale []byte, cut int) {
		if bytes.Contains(append(append([]byte{}, stale...), answer(n)[:len(answer(n))-1]...), answer(n)) {
			t.Skip("the stale bytes hold the answer")
		}
		in := append(append(append([]byte{}, stale...), answer(n)...), "rest"...)
		cut = max(0, min(cut, len(in)))
		r := bufio.NewReaderSize(io.MultiReader(bytes.NewReader(in[:cut]), bytes.NewReader(in[cut:])), 64)
		if err := scanAnswer(r, n); err != nil {
			t.Fatal(err)
		}
		if rest, _ := io.ReadAll(r); string(rest) != "rest" {
			t.Fatalf("scanned to %q", rest)
		}
	})
}

// FuzzGuestSession feeds the host's session what a guest might send.
func FuzzGuestSession(f *testing.F) {
	f.Add([]byte{0, 1, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0})
	f.Add([]byte{0, 1, 0, 8, 0, 0, 0, 1, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, in []byte) {
		l := newLink(bufio.NewReaderSize(bytes.NewReader(in), maxFrame), io.Discard, func() error { return nil }, false)
		var frames int
		for {
			n, err := l.Read(make([]byte, 4096))
			if err != nil {
				break
			}
			frames += n
		}
		if frames > len(in) {
			t.Fatalf("%d bytes of frames in %d", frames, len(in))
		}
	})
}
