// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package network

import (
	"errors"
	"fmt"
	"net"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// readRules adds the rules that say which table of routes is asked.
func (n *Network) readRules(h *netlink.Handle) error {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rules, err := retry(func() ([]netlink.Rule, error) { return h.RuleList(family) })
		if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
			continue // a host without the family, or without rules
		}
		if err != nil {
			return fmt.Errorf("list rules of routing: %w", err)
		}
		for i := range rules {
			r := &rules[i]
			if isKernelsRule(r) {
				continue
			}
			rule, err := guestRule(r, family)
			if err != nil {
				return err
			}
			n.Rules = append(n.Rules, rule)
		}
	}
	return nil
}

// isKernelsRule is true for the three rules that a kernel begins with, for its tables
// local, main and default.
func isKernelsRule(r *netlink.Rule) bool {
	const lastPriority = 0x7fff
	own := map[int]int{0: unix.RT_TABLE_LOCAL, lastPriority - 1: unix.RT_TABLE_MAIN, lastPriority: unix.RT_TABLE_DEFAULT}
	table, ok := own[r.Priority]
	return ok && r.Table == table && isAny(r.Src) && isAny(r.Dst) && r.IifName == "" && r.OifName == "" && r.Mark == 0
}

// isAny is true for a prefix of all addresses, which the kernel leaves out.
func isAny(n *net.IPNet) bool { return n == nil || isDefault(n) }

// guestRule is a rule for the guest. It returns ErrNotImplemented for one that looks at
// more than the agent knows of.
func guestRule(r *netlink.Rule, family int) (*guestv1.Rule, error) {
	if r.Table <= 0 || r.Goto >= 0 || r.Flow >= 0 || r.SuppressIfgroup >= 0 || r.SuppressPrefixlen >= 0 || r.Tos != 0 ||
		r.TunID != 0 || r.IPProto != 0 || r.Dport != nil || r.Sport != nil || r.UIDRange != nil {
		return nil, fmt.Errorf("routing rule %d, %s, is by more than addresses, interfaces and marks, or for no table: %w",
			r.Priority, r, errdefs.ErrNotImplemented)
	}
	rule := &guestv1.Rule{
		Family:   uint32(family), //nolint:gosec // one of two constants
		Priority: uint32(r.Priority),
		Table:    uint32(r.Table),
		Input:    r.IifName,
		Output:   r.OifName,
		Mark:     r.Mark,
		Invert:   r.Invert,
	}
	if r.Mask != nil {
		rule.Mask = *r.Mask
	}
	if !isAny(r.Src) {
		rule.Source = r.Src.String()
	}
	if !isAny(r.Dst) {
		rule.Destination = r.Dst.String()
	}
	return rule, nil
}
