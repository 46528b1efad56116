// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package network

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/api/thread"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

// netNS is a network namespace of a test's own, which goes with its handle.
type netNS struct {
	netns.NsHandle
	*netlink.Handle
	path string
}

func newNetNS(t *testing.T) *netNS {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make network namespaces")
	}
	var ns netns.NsHandle
	require.NoError(t, thread.Run(func() (err error) {
		ns, err = netns.New()
		return err
	}))
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	require.NoError(t, err)
	t.Cleanup(func() {
		h.Close()
		require.NoError(t, ns.Close())
	})
	lo, err := h.LinkByName("lo")
	require.NoError(t, err)
	require.NoError(t, h.LinkSetUp(lo))
	return &netNS{NsHandle: ns, Handle: h, path: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), int(ns))}
}

func cidr(t *testing.T, s string) *net.IPNet {
	t.Helper()
	ip, n, err := net.ParseCIDR(s)
	require.NoError(t, err)
	return &net.IPNet{IP: ip, Mask: n.Mask}
}

// addVeth makes a pair of eth<n> in pod and peer<n> in outside, as CNI does.
func addVeth(t *testing.T, pod, outside *netNS, n int, mtu int, addrs ...string) (eth, peer netlink.Link) {
	t.Helper()
	name, peerName := fmt.Sprintf("eth%d", n), fmt.Sprintf("peer%d", n)
	require.NoError(t, pod.LinkAdd(&netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: name, MTU: mtu, HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, byte(n + 1)}},
		PeerName:      peerName,
		PeerNamespace: netlink.NsFd(int(outside.NsHandle)),
		PeerMTU:       uint32(mtu),
	}))
	eth, err := pod.LinkByName(name)
	require.NoError(t, err)
	peer, err = outside.LinkByName(peerName)
	require.NoError(t, err)
	require.NoError(t, pod.LinkSetUp(eth))
	require.NoError(t, outside.LinkSetUp(peer))
	for _, a := range addrs {
		require.NoError(t, pod.AddrAdd(eth, &netlink.Addr{IPNet: cidr(t, a), Flags: unix.IFA_F_NODAD}))
	}
	return eth, peer
}

// podNetwork makes what a bridge plugin with IPv4 and IPv6 makes.
func podNetwork(t *testing.T) (pod, outside *netNS) {
	t.Helper()
	pod, outside = newNetNS(t), newNetNS(t)
	eth, peer := addVeth(t, pod, outside, 0, 1450, "10.88.0.5/16", "fd00:88::5/64")
	require.NoError(t, outside.AddrAdd(peer, &netlink.Addr{IPNet: cidr(t, "10.88.0.1/16")}))
	require.NoError(t, outside.AddrAdd(peer, &netlink.Addr{IPNet: cidr(t, "fd00:88::1/64"), Flags: unix.IFA_F_NODAD}))
	for _, gw := range []string{"10.88.0.1", "fd00:88::1"} {
		require.NoError(t, pod.RouteAdd(&netlink.Route{LinkIndex: eth.Attrs().Index, Gw: net.ParseIP(gw)}))
	}
	return pod, outside
}

// vmID is the tests' VM.
const vmID = "0123456789ab"

// connection is a VM's TAP and the network that it was joined to.
type connection struct {
	*Network
	tap     *os.File
	waiting *Waiting
}

// waiting is a namespace for TAPs, which goes with the test.
func waiting(t *testing.T) *Waiting {
	t.Helper()
	w, err := OpenWaiting(filepath.Join(t.TempDir(), "state", "taps"))
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, w.Remove())
		require.NoError(t, w.Remove(), "again")
	})
	return w
}

// connect makes a VM's TAP and joins it to a pod's network.
func connect(ctx context.Context, t *testing.T, path string) (*connection, error) {
	t.Helper()
	n, err := Read(ctx, path)
	if err != nil {
		return nil, err
	}
	w := waiting(t)
	tap, err := w.Make(vmID)
	require.NoError(t, err)
	t.Cleanup(func() { _ = tap.Close() })
	return &connection{n, tap, w}, n.Join(ctx, path, w, vmID)
}

// Close is what the end of the VM is.
func (c *connection) Close() error {
	_ = c.tap.Close()
	return c.Network.Close()
}

// TestWaiting makes TAPs that are there for whoever opens the same place later,
// one for each VM, and that nobody else sees.
func TestWaiting(t *testing.T) {
	newNetNS(t) // skips without root
	path := filepath.Join(t.TempDir(), "taps")
	require.NoError(t, os.WriteFile(path, nil, 0o600), "a mount point that was left")
	w, err := OpenWaiting(path)
	require.NoError(t, err)
	defer func() { require.NoError(t, w.Remove()) }()
	tap, err := w.Make(vmID)
	require.NoError(t, err)
	defer tap.Close()
	_, err = tap.Write(make([]byte, 100))
	require.NoError(t, err, "it takes what the VM sends")
	_, err = w.Make(vmID)
	require.Error(t, err, "it has one")
	_, err = netlink.LinkByName(linkName(vmID))
	require.Error(t, err, "the host's namespace shows it")

	w, err = OpenWaiting(path)
	require.NoError(t, err)
	pod, _ := podNetwork(t)
	before := state(t, pod)
	n, err := Read(t.Context(), pod.path)
	require.NoError(t, err)
	require.ErrorIs(t, n.Join(t.Context(), pod.path, w, "another"), errdefs.ErrNotFound)
	require.Equal(t, before, state(t, pod))
	require.NoError(t, n.Join(t.Context(), pod.path, w, vmID))
	require.ErrorIs(t, n.Join(t.Context(), pod.path, w, vmID), errdefs.ErrAlreadyExists, "it was joined")
}

func TestANamespaceWithLoopbackOnly(t *testing.T) {
	pod := newNetNS(t)
	n, err := connect(t.Context(), t, pod.path)
	require.NoError(t, err)
	require.Empty(t, n.NICs)
	require.Empty(t, n.Interfaces)
	require.NoError(t, n.Close())
	require.NoError(t, Disconnect(t.Context(), pod.path))
}

func TestDisconnectUndoesJoin(t *testing.T) {
	pod, _ := podNetwork(t)
	before := state(t, pod)
	for range 3 {
		n, err := connect(t.Context(), t, pod.path)
		require.NoError(t, err)
		require.NotEqual(t, before, state(t, pod))
		require.NoError(t, Disconnect(t.Context(), pod.path))
		require.NotContains(t, state(t, pod), "ingress")
		require.NoError(t, Disconnect(t.Context(), pod.path))
		require.NoError(t, Clear(t.Context(), pod.path))
		require.Equal(t, before, state(t, pod))
		require.NoError(t, Clear(t.Context(), pod.path))
		require.NoError(t, n.Close())
		require.NoError(t, n.Close())
	}
}

// A VM that ends takes its TAPs along; the pair of devices that led to one goes when the
// pod's namespace is cleared, or with it.
func TestWhatGoesWithAVM(t *testing.T) {
	pod, outside := podNetwork(t)
	addVeth(t, pod, outside, 1, 1500, "172.16.0.2/24")
	before := state(t, pod)
	n, err := connect(t.Context(), t, pod.path)
	require.NoError(t, err)
	require.Contains(t, state(t, pod), linkPrefix+"nic1")
	require.NoError(t, n.Close())
	require.Eventually(t, func() bool { return !strings.Contains(state(t, pod), linkPrefix+"nic1") }, 5*time.Second, 10*time.Millisecond)
	require.NoError(t, Clear(t.Context(), pod.path))
	require.Equal(t, before, state(t, pod))

	n, err = connect(t.Context(), t, pod.path)
	require.NoError(t, err)
	defer n.Close()
	w, h, err := open(n.waiting.path)
	require.NoError(t, err)
	defer w.Close()
	defer h.Close()
	pairs := func() (names []string) {
		links, err := h.LinkList()
		require.NoError(t, err)
		for _, l := range links {
			if l.Type() == "veth" {
				names = append(names, l.Attrs().Name)
			}
		}
		return names
	}
	require.Len(t, pairs(), 1)
	require.NoError(t, Clear(t.Context(), pod.path))
	require.Empty(t, pairs(), "the other end is left")
}

func TestConnectingFailsWithoutTraces(t *testing.T) {
	for name, tc := range map[string]struct {
		prepare func(*testing.T, *netNS)
		want    error
	}{
		"a name is taken": {func(t *testing.T, pod *netNS) {
			require.NoError(t, pod.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: linkPrefix + "nic1"}}))
		}, nil},
		"a tunnel": {func(t *testing.T, pod *netNS) {
			tun := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "tun9"}, Mode: netlink.TUNTAP_MODE_TUN}
			require.NoError(t, inNetNS(pod.NsHandle, func() error { return netlink.LinkAdd(tun) }))
			require.NoError(t, pod.LinkSetUp(tun))
		}, errdefs.ErrNotImplemented},
		"a bond": {func(t *testing.T, pod *netNS) {
			bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br9"}}
			require.NoError(t, pod.LinkAdd(bridge))
			eth, _ := pod.LinkByName("eth1")
			require.NoError(t, pod.LinkSetMaster(eth, bridge))
		}, errdefs.ErrNotImplemented},
		"a multipath route": {func(t *testing.T, pod *netNS) {
			eth, _ := pod.LinkByName("eth1")
			idx := eth.Attrs().Index
			require.NoError(t, pod.RouteAdd(&netlink.Route{Dst: cidr(t, "192.0.2.0/24"), MultiPath: []*netlink.NexthopInfo{
				{LinkIndex: idx, Gw: net.ParseIP("172.16.0.8")}, {LinkIndex: idx, Gw: net.ParseIP("172.16.0.9")},
			}}))
		}, errdefs.ErrNotImplemented},
	} {
		t.Run(name, func(t *testing.T) {
			pod, outside := podNetwork(t)
			addVeth(t, pod, outside, 1, 1500, "172.16.0.2/24")
			tc.prepare(t, pod)
			before := state(t, pod)
			_, err := connect(t.Context(), t, pod.path)
			require.Error(t, err)
			if tc.want != nil {
				require.ErrorIs(t, err, tc.want)
			}
			require.Equal(t, before, state(t, pod))
		})
	}
	t.Run("cancelled", func(t *testing.T) {
		pod, _ := podNetwork(t)
		before := state(t, pod)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := connect(ctx, t, pod.path)
		require.ErrorIs(t, err, context.Canceled)
		require.Equal(t, before, state(t, pod))
	})
}

func TestANamespaceThatIsGone(t *testing.T) {
	t.Parallel()
	gone := filepath.Join(t.TempDir(), "cni-1234")
	_, err := Read(t.Context(), gone)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.NoError(t, Disconnect(t.Context(), gone))
	require.NoError(t, Clear(t.Context(), gone))
	require.NoError(t, os.WriteFile(gone, nil, 0o600), "the mount point without its namespace")
	_, err = Read(t.Context(), gone)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.NoError(t, Disconnect(t.Context(), gone))
	require.NoError(t, Disconnect(t.Context(), ""))
}

func TestThreadsComeBack(t *testing.T) {
	pod := newNetNS(t)
	self, err := netns.Get()
	require.NoError(t, err)
	defer self.Close()
	for range 50 {
		require.NoError(t, inNetNS(pod.NsHandle, func() error {
			here, err := netns.Get()
			if err != nil {
				return err
			}
			defer here.Close()
			if !here.Equal(pod.NsHandle) {
				return errdefs.ErrInternal
			}
			return nil
		}))
		here, err := netns.Get()
		require.NoError(t, err)
		require.True(t, here.Equal(self))
		require.NoError(t, here.Close())
	}
}

// state lists links and qdiscs of a namespace.
func state(t *testing.T, ns *netNS) string {
	t.Helper()
	links, err := ns.LinkList()
	require.NoError(t, err)
	var b strings.Builder
	for _, l := range links {
		fmt.Fprintf(&b, "%s %s", l.Attrs().Name, l.Attrs().Flags&net.FlagUp)
		qdiscs, err := ns.QdiscList(l)
		require.NoError(t, err)
		for _, q := range qdiscs {
			fmt.Fprintf(&b, " %s", q.Type())
		}
		b.WriteByte('\n')
	}
	return b.String()
}

const vnetHeader = 10
