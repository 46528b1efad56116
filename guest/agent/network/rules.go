// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package network

import (
	"math"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// parseRules decodes the routing rules of a request with interfaces of these names.
func parseRules(rules []*guestv1.Rule, names map[string]bool) ([]*netlink.Rule, error) {
	var all []*netlink.Rule
	for _, r := range rules {
		rule, err := parseRule(r)
		if err != nil {
			return nil, err
		}
		for _, name := range []string{r.GetInput(), r.GetOutput()} {
			if name != "" && name != "lo" && !names[name] {
				return nil, invalid("routing rule %d by unknown interface %q", r.GetPriority(), name)
			}
		}
		all = append(all, rule)
	}
	return all, nil
}

func parseRule(r *guestv1.Rule) (*netlink.Rule, error) {
	n := netlink.NewRule()
	if r.GetFamily() != unix.AF_INET && r.GetFamily() != unix.AF_INET6 {
		return nil, invalid("routing rule %d: family %d", r.GetPriority(), r.GetFamily())
	}
	if r.GetTable() == 0 || r.GetTable() > math.MaxInt32 || r.GetPriority() > math.MaxInt32 {
		return nil, invalid("routing rule %d: table %d: want 1 to %d, as for the priority", r.GetPriority(), r.GetTable(), math.MaxInt32)
	}
	n.Family, n.Priority, n.Table = int(r.GetFamily()), int(r.GetPriority()), int(r.GetTable())
	n.IifName, n.OifName, n.Mark, n.Invert = r.GetInput(), r.GetOutput(), r.GetMark(), r.GetInvert()
	if mask := r.GetMask(); mask != 0 {
		n.Mask = &mask
	}
	for _, a := range []struct {
		text string
		to   **net.IPNet
	}{{r.GetSource(), &n.Src}, {r.GetDestination(), &n.Dst}} {
		if a.text == "" {
			continue
		}
		_, prefix, err := net.ParseCIDR(a.text)
		if err != nil || (prefix.IP.To4() != nil) != (n.Family == unix.AF_INET) {
			return nil, invalid("routing rule %d: %q: want CIDR of family %d", r.GetPriority(), a.text, r.GetFamily())
		}
		*a.to = prefix
	}
	return n, nil
}
