// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package network

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// readFirewall notes the firewalls that a CNI plugin has made inside the namespace, which
// the VM's frames pass below.
func (n *Network) readFirewall(ns netns.NsHandle) error {
	conn, err := openNftables(ns)
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	chains, err := conn.ListChains()
	if err != nil && !errors.Is(err, unix.EPROTONOSUPPORT) && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("list chains of nftables: %w", err)
	}
	for _, c := range chains {
		// A chain without a hook is only what others lead to.
		if c.Hooknum != nil && c.Table.Name != forwardTable {
			n.Firewalls = append(n.Firewalls, "nftables table "+c.Table.Name)
		}
	}
	err = inNetNS(ns, func() error {
		// The tables of an iptables that does not use nftables.
		for _, file := range []string{"ip_tables_names", "ip6_tables_names"} {
			b, err := os.ReadFile("/proc/thread-self/net/" + file)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			for name := range strings.FieldsSeq(string(b)) {
				n.Firewalls = append(n.Firewalls, "iptables table "+name)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("list tables of iptables: %w", err)
	}
	slices.Sort(n.Firewalls)
	n.Firewalls = slices.Compact(n.Firewalls)
	return nil
}
