// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testnode

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/containerd/errdefs"
)

// With br_netfilter, which Docker loads, a host's firewall sees also what a bridge
// carries from one of its ports to another, and Docker's lets nothing pass that it
// does not know. Rules of the node's own, which bear its bridge's name, let pass
// what comes from one of its bridges and goes to one. They concern nothing else, and
// are made only where something is filtered at all.

// ipFamily is a protocol, and how its firewall is asked.
type ipFamily struct {
	// program is the one of iptables, sysctl the one that sends bridged packets to it.
	program, sysctl string
	// nft is what nftables calls the family.
	nft string
}

var ipFamilies = []ipFamily{
	{"iptables", "bridge-nf-call-iptables", "ip"},
	{"ip6tables", "bridge-nf-call-ip6tables", "ip6"},
}

// openFirewall lets the pods reach each other where the host's firewall would
// not have it. closeFirewall undoes it, also after a failure.
func (n *Node) openFirewall() error {
	var errs []error
	for _, f := range ipFamilies {
		if !f.filters() {
			continue
		}
		for _, w := range n.ways() {
			if w.from != w.to || f.bridged() {
				errs = append(errs, command(f.program, append([]string{"-w", "-I", "FORWARD"}, n.iptablesRule(w)...)...))
			}
		}
	}
	chains, err := forwardChains()
	errs = append(errs, err)
	for _, c := range chains {
		for _, w := range n.ways() {
			if w.from != w.to || bridged(c.Family) {
				errs = append(errs, command("nft", fmt.Sprintf("insert rule %s iifname %q oifname %q accept comment %q", c, w.from, w.to, n.Bridge())))
			}
		}
	}
	return errors.Join(errs...)
}

// closeFirewall removes the rules of this node and of an earlier one of its name.
func (n *Node) closeFirewall() error {
	var errs []error
	for _, f := range ipFamilies {
		for _, w := range ways(n.bridges()) {
			rule := n.iptablesRule(w)
			for command(f.program, append([]string{"-w", "-C", "FORWARD"}, rule...)...) == nil {
				if err := command(f.program, append([]string{"-w", "-D", "FORWARD"}, rule...)...); err != nil {
					errs = append(errs, err)
					break
				}
			}
		}
	}
	chains, err := forwardChains()
	errs = append(errs, err)
	for _, c := range chains {
		errs = append(errs, c.removeRules(n.Bridge()))
	}
	return errors.Join(errs...)
}

// way is one from a bridge to the same or another.
type way struct{ from, to string }

// ways are those between the node's bridges.
func (n *Node) ways() []way {
	there := []string{n.Bridge()}
	for _, l := range n.lans {
		there = append(there, l.Bridge)
	}
	return ways(there)
}

func ways(bridges []string) []way {
	var all []way
	for _, from := range bridges {
		for _, to := range bridges {
			all = append(all, way{from, to})
		}
	}
	return all
}

// iptablesRule is the node's rule for a way, for iptables and ip6tables.
func (n *Node) iptablesRule(w way) []string {
	return []string{"-i", w.from, "-o", w.to, "-m", "comment", "--comment", n.Bridge(), "-j", "ACCEPT"}
}

// bridged tells whether the family's firewall sees what bridges carry.
func (f ipFamily) bridged() bool {
	b, err := os.ReadFile("/proc/sys/net/bridge/" + f.sysctl)
	return err == nil && strings.TrimSpace(string(b)) != "0"
}

// bridged is the same for a family of nftables; inet is both protocols'.
func bridged(family string) bool {
	for _, f := range ipFamilies {
		if (family == f.nft || family == "inet") && f.bridged() {
			return true
		}
	}
	return false
}

// filters tells whether iptables has anything but its initial state, in which
// everything passes. Where it cannot be asked it filters nothing.
func (f ipFamily) filters() bool {
	out, err := exec.Command(f.program, "-w", "-S", "FORWARD").Output()
	return err == nil && strings.TrimSpace(string(out)) != "-P FORWARD ACCEPT"
}

// forwardChain is a chain of nftables that sees forwarded packets.
type forwardChain struct {
	Family, Table, Name string
	Type, Hook          string
}

// String is how nft names it.
func (c forwardChain) String() string { return fmt.Sprintf("%s %s %s", c.Family, c.Table, c.Name) }

// forwardChains lists those that iptables has not made, or all where there is no
// iptables.
func forwardChains() ([]forwardChain, error) {
	var all []struct {
		Chain *forwardChain `json:"chain"`
	}
	if err := listNFT(&all, "chains"); err != nil {
		return nil, err
	}
	var chains []forwardChain
	for _, o := range all {
		c := o.Chain
		if c == nil || c.Type != "filter" || c.Hook != "forward" {
			continue
		}
		if !ofIPTables(*c) {
			chains = append(chains, *c)
		}
	}
	return chains, nil
}

// ofIPTables tells whether a chain is one that the host's iptables shows too.
func ofIPTables(c forwardChain) bool {
	for _, f := range ipFamilies {
		if _, err := exec.LookPath(f.program); err == nil && c.Family == f.nft && c.Table == "filter" && c.Name == "FORWARD" {
			return true
		}
	}
	return false
}

// removeRules removes the chain's rules with the given comment.
func (c forwardChain) removeRules(comment string) error {
	var all []struct {
		Rule struct {
			Handle  int
			Comment string
		} `json:"rule"`
	}
	if err := listNFT(&all, "chain "+c.String()); err != nil {
		return err
	}
	var errs []error
	for _, o := range all {
		if o.Rule.Comment == comment {
			errs = append(errs, command("nft", fmt.Sprintf("delete rule %s handle %d", c, o.Rule.Handle)))
		}
	}
	return errors.Join(errs...)
}

// listNFT has nft list what, and decodes the objects. A host without nft, or
// without nftables, has none.
func listNFT(objects any, what string) error {
	out, err := exec.Command("nft", "-j", "list "+what).Output()
	if err != nil {
		return nil
	}
	answer := struct {
		Objects any `json:"nftables"`
	}{objects}
	if err := json.Unmarshal(out, &answer); err != nil {
		return fmt.Errorf("nft list %s: %w: %w", what, err, errdefs.ErrInternal)
	}
	return nil
}

// command runs a program; the error holds what it says.
func command(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}
