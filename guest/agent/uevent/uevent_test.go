// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package uevent

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestParse(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name, msg string
		want      Event
		ok        bool
	}{
		{"block", "add@/devices/pci/block/vdb\x00ACTION=add\x00SUBSYSTEM=block\x00SEQNUM=7\x00", Event{"add", "/devices/pci/block/vdb", "block"}, true},
		{"no subsystem", "change@/x\x00", Event{"change", "/x", ""}, true},
		{"udev's", "libudev\x00\xfe\xed\xca\xfe", Event{}, false},
		{"empty", "", Event{}, false},
		{"relative", "add@x\x00", Event{}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			got, ok := parse([]byte(tc.msg))
			require.Equal(t, tc.ok, ok)
			if ok {
				require.Equal(t, tc.want, got)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("add@/devices/x\x00SUBSYSTEM=block\x00"))
	f.Fuzz(func(_ *testing.T, b []byte) { parse(b) })
}

func TestAwait(t *testing.T) {
	t.Parallel()
	n := 0
	require.NoError(t, Await(t.Context(), time.Millisecond, func() (bool, error) { n++; return n == 4, nil }))
	require.Equal(t, 4, n)

	boom := errors.New("boom")
	require.ErrorIs(t, Await(t.Context(), 0, func() (bool, error) { return false, boom }), boom)

	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, Await(ctx, 0, func() (bool, error) { return false, nil }, "block"), context.DeadlineExceeded)
}
