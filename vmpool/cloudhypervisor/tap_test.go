// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package cloudhypervisor

import (
	"os"
	"runtime"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmmtest/realvm"
)

// A TAP is found in the namespace that it is in, which as a rule is a pod's.
func TestMTUInAnotherNamespace(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	own, err := netns.Get()
	require.NoError(t, err)
	defer own.Close() //nolint:errcheck // only read
	other, err := netns.New()
	if err != nil {
		t.Skipf("no network namespaces: %v", err)
	}
	defer func() { require.NoError(t, netns.Set(own)) }()
	defer other.Close() //nolint:errcheck // only read
	tap := realvm.TAP(t, 1)[0]
	require.NoError(t, netns.Set(own))
	_, err = netlink.LinkByName(tap.Name())
	require.ErrorAs(t, err, &netlink.LinkNotFoundError{})

	raw, err := tap.SyscallConn()
	require.NoError(t, err)
	require.NoError(t, raw.Control(func(fd uintptr) { err = setMTU(int(fd), 1380) }))
	require.NoError(t, err)
	handle, err := netlink.NewHandleAt(other, unix.NETLINK_ROUTE)
	require.NoError(t, err)
	defer handle.Close()
	link, err := handle.LinkByName(tap.Name())
	require.NoError(t, err)
	assert.Equal(t, 1380, link.Attrs().MTU)
	require.Error(t, setMTU(int(os.Stdin.Fd()), 1380), "it is no TAP")
}
