// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testnode

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestPortmapRemovals(t *testing.T) {
	t.Parallel()
	require.Equal(t, [][]string{
		{"-D", "PREROUTING", "-m", "addrtype", "--dst-type", "LOCAL", "-j", "CNI-HOSTPORT-DNAT"},
		{"-D", "POSTROUTING", "-m", "comment", "--comment", "CNI portfwd requiring masquerade", "-j", "CNI-HOSTPORT-MASQ"},
		{"-F", "CNI-HOSTPORT-DNAT"},
		{"-F", "CNI-HOSTPORT-MASQ"},
		{"-X", "CNI-HOSTPORT-DNAT"},
		{"-X", "CNI-HOSTPORT-MASQ"},
	}, portmapRemovals([]string{
		"-P PREROUTING ACCEPT",
		"-N CNI-HOSTPORT-DNAT",
		"-N CNI-HOSTPORT-MASQ",
		"-N DOCKER",
		"-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT",
		"-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER",
		`-A POSTROUTING -m comment --comment "CNI portfwd requiring masquerade" -j CNI-HOSTPORT-MASQ`,
		"-A CNI-HOSTPORT-MASQ -m mark --mark 0x2000/0x2000 -j MASQUERADE",
	}))
	require.Empty(t, portmapRemovals([]string{"-P PREROUTING ACCEPT", "-N DOCKER"}))
}
