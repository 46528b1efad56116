// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testnode

import (
	"context"
	"errors"
	"net/netip"
	"os/exec"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
)

func TestDiff(t *testing.T) {
	before := Census{Items: map[string]int{"a": 1, "b": 2, "c": 3}, Own: map[string]int{"goroutine x": 1}, pid: 7}
	after := Census{Items: map[string]int{"a": 1, "b": 4, "d": 1}, Own: map[string]int{"goroutine x": 3}, pid: 7}
	require.Empty(t, before.Diff(before))
	require.Equal(t, []string{"+1 d", "+2 b", "+2 goroutine x", "-3 c"}, after.Diff(before))
	after.pid = 8
	require.Equal(t, []string{"+1 d", "+2 b", "-3 c"}, after.Diff(before), "another process's own things")
	require.Equal(t, 6, Census{Items: map[string]int{"link veth": 4, "link tuntap": 2, "linked": 9}}.Count("link"))
}

func TestNameless(t *testing.T) {
	for in, want := range map[string]string{
		"run/5a0708fedc3fc0e5be87bb876bac25f4/record.json":          "run/<id>/record.json",
		"cache/templates/5a0708fedc3fc0e5be87bb876bac25f4/state":    "cache/templates/<id>/state",
		"cache/templates/5a0708fedc3fc0e5be87bb876bac25f4-12/state": "cache/templates/<id>/state",
		"netns/cni-0b7e2bd1-f0ee-8a2c-3b1c-2f1f1a2b3c4d":            "netns/cni-<uuid>",
		"socket:[12345]": "socket:[<n>]",
		"feed":           "feed",
	} {
		require.Equal(t, want, nameless(in))
	}
}

func TestFreeSubnets(t *testing.T) {
	one, err := freeSubnets("one")
	require.NoError(t, err)
	require.True(t, netip.MustParsePrefix("10.64.0.0/10").Overlaps(one.v4))
	again, err := freeSubnets("one")
	require.NoError(t, err)
	require.Equal(t, one, again)
	require.True(t, overlaps([]netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, one.v4))
	require.False(t, overlaps([]netip.Prefix{netip.MustParsePrefix("192.168.0.0/16")}, one.v4))
}

func TestOptions(t *testing.T) {
	for _, name := range []string{"", "UPPER", "0digit", "far-too-long-for-a-bridge", "a/b"} {
		_, err := New(Options{Name: name})
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, name)
	}
	missing, err := Missing(Options{Name: "x", BinDir: "/no/bin", GuestDir: "/no/guest", CNIBinDir: "/no/cni"})
	require.NoError(t, err)
	require.Contains(t, missing, "/no/bin/containerd")
	require.Contains(t, missing, "/no/guest/vmlinux")
}

func TestEventually(t *testing.T) {
	calls := 0
	require.NoError(t, Eventually(t.Context(), func(context.Context) error {
		if calls++; calls < 3 {
			return errdefs.ErrUnavailable
		}
		return nil
	}))
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	first := errors.New("what was wrong before the end")
	err := Eventually(ctx, func(ctx context.Context) error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return first
	})
	require.ErrorIs(t, err, first)
	require.ErrorIs(t, err, context.DeadlineExceeded)
}

func TestKill9(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	require.NoError(t, cmd.Start())
	require.NoError(t, Kill9(t.Context(), cmd.Process.Pid))
	require.Error(t, cmd.Wait())
}
