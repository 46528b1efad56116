// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testnode

import (
	"os"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// TestCensusOfNetworks leaves behind what a pod's network may, a piece at a time.
func TestCensusOfNetworks(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make network namespaces")
	}
	n := &Node{opts: Options{Name: "census"}, dir: t.TempDir()}
	count := func() map[string]int {
		items := map[string]int{}
		require.NoError(t, n.countNetwork(items))
		return items
	}
	none := map[string]int{"network namespace": 0, "CNI result": 0}
	require.Equal(t, none, count())

	path := n.Dir("netns")
	require.NoError(t, os.WriteFile(path, nil, 0o600))
	ns := mountNS(t, path)
	space := map[string]int{"network namespace": 1, "CNI result": 0}
	require.Equal(t, space, count())

	attrs := netlink.NewLinkAttrs()
	attrs.Name = "chv-census0"
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns)}
	require.NoError(t, netlink.LinkAdd(veth))
	t.Cleanup(func() { _ = netlink.LinkDel(veth) })
	linked := map[string]int{"network namespace": 1, "CNI result": 0, "link veth without a bridge": 1, "inner link veth": 1}
	require.Equal(t, linked, count())

	// Somebody else's are not counted.
	other := &Node{opts: Options{Name: "other"}, dir: t.TempDir()}
	items := map[string]int{}
	require.NoError(t, other.countNetwork(items))
	require.Equal(t, none, items)

	require.NoError(t, netlink.LinkDel(veth))
	require.Equal(t, space, count())
	require.NoError(t, unix.Unmount(path, unix.MNT_DETACH))
	require.Equal(t, none, count())
}

// mountNS mounts a new network namespace at path until the test ends.
func mountNS(t *testing.T, path string) netns.NsHandle {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	here, err := netns.Get()
	require.NoError(t, err)
	defer here.Close()
	ns, err := netns.New()
	require.NoError(t, err)
	t.Cleanup(func() { ns.Close() })
	err = unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
	require.NoError(t, netns.Set(here))
	require.NoError(t, err)
	t.Cleanup(func() { _ = unix.Unmount(path, unix.MNT_DETACH) })
	return ns
}
