// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testnode

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestChainRemovals(t *testing.T) {
	t.Parallel()
	require.Equal(t, [][]string{
		{"-D", "PREROUTING", "-m", "addrtype", "--dst-type", "LOCAL", "-j", "CNI-HOSTPORT-DNAT"},
		{"-D", "POSTROUTING", "-m", "comment", "--comment", "CNI portfwd requiring masquerade", "-j", "CNI-HOSTPORT-MASQ"},
		{"-F", "CNI-HOSTPORT-DNAT"},
		{"-F", "CNI-HOSTPORT-MASQ"},
		{"-X", "CNI-HOSTPORT-DNAT"},
		{"-X", "CNI-HOSTPORT-MASQ"},
	}, chainRemovals([]string{
		"-P PREROUTING ACCEPT",
		"-N CNI-HOSTPORT-DNAT",
		"-N CNI-HOSTPORT-MASQ",
		"-N DOCKER",
		"-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT",
		"-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER",
		`-A POSTROUTING -m comment --comment "CNI portfwd requiring masquerade" -j CNI-HOSTPORT-MASQ`,
		"-A CNI-HOSTPORT-MASQ -m mark --mark 0x2000/0x2000 -j MASQUERADE",
	}, "CNI-HOSTPORT-"))
	require.Equal(t, [][]string{
		{"-D", "FORWARD", "-m", "comment", "--comment", "CNI firewall plugin rules", "-j", "CNI-FORWARD"},
		{"-F", "CNI-ADMIN"},
		{"-F", "CNI-FORWARD"},
		{"-X", "CNI-ADMIN"},
		{"-X", "CNI-FORWARD"},
	}, chainRemovals([]string{
		"-P FORWARD DROP",
		"-N CNI-ADMIN",
		"-N CNI-FORWARD",
		`-A FORWARD -m comment --comment "CNI firewall plugin rules" -j CNI-FORWARD`,
		`-A CNI-FORWARD -m comment --comment "CNI firewall plugin admin overrides" -j CNI-ADMIN`,
	}, "CNI-"))
	require.Empty(t, chainRemovals([]string{"-P PREROUTING ACCEPT", "-N DOCKER"}, "CNI-HOSTPORT-"))
}
