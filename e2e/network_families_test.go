// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"github.com/stretchr/testify/require"
)

// networkIPv6Only runs pods that have no IPv4 address beside 127.0.0.1.
func networkIPv6Only(l lab) {
	l.needIPv6()
	a, b := l.server("six"), l.server("six")
	require.Len(l, a.ips(), 1)
	ipA := a.ips()[0]
	require.Empty(l, a.sh("ip -4 addr show eth0; ip -4 route"))
	require.Contains(l, a.sh("ip -6 addr show eth0"), ipA+"/64")
	b.reach("pod to pod", ipA)
	hostTransfer(l.T, "host to pod", serverAt(ipA), aFew)
	a.transfer(l.T, "pod to host", hostServer(l.T, l.n.LANs()[0].HostIPs()[1]), aFew)
	a.reach("inside, by IPv4", "127.0.0.1")
	a.reach("inside, by IPv6", "::1")
}
