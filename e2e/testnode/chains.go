// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testnode

import (
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
)

// The CNI plugins portmap and firewall remove a pod's rules with the pod, but never the
// chains that lead to them. The node removes those, if they came with it: a file says so,
// by which a next node of the name knows it too.

// cniChains are the tables with such chains, and how their names begin.
var cniChains = []struct{ table, prefix string }{{"nat", "CNI-HOSTPORT-"}, {"filter", "CNI-"}}

// rules lists the rules of one of the family's tables, as iptables takes them; none
// where it cannot be asked.
func (f ipFamily) rules(table string) []string {
	out, err := exec.Command(f.program, "-w", "-t", table, "-S").Output()
	if err != nil {
		return nil
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

// ownChains notes which tables have none of the plugins' chains yet.
func (n *Node) ownChains() error {
	if !n.opts.HostPorts && len(n.opts.Networks) == 0 {
		return nil
	}
	var own []string
	for _, f := range ipFamilies {
		for _, c := range cniChains {
			if !strings.Contains(strings.Join(f.rules(c.table), "\n"), "-N "+c.prefix) {
				own = append(own, f.program+" "+c.table)
			}
		}
	}
	return os.WriteFile(n.Dir(chainsFile), []byte(strings.Join(own, "\n")), 0o644)
}

const chainsFile = "chains"

// RemoveChains removes the plugins' chains that came with this node, or an earlier one of
// its name. No pod that uses them may be there.
func (n *Node) RemoveChains() error {
	text, err := os.ReadFile(n.Dir(chainsFile))
	if err != nil {
		return nil
	}
	own := strings.Split(string(text), "\n")
	var errs []error
	for _, f := range ipFamilies {
		for _, c := range cniChains {
			if !slices.Contains(own, f.program+" "+c.table) {
				continue
			}
			for _, args := range chainRemovals(f.rules(c.table), c.prefix) {
				errs = append(errs, command(f.program, append([]string{"-w", "-t", c.table}, args...)...))
			}
		}
	}
	return errors.Join(errs...)
}

// chainRemovals are iptables' arguments that remove the chains with this prefix from a
// table with these rules: first what leads to them, then what is in them, then they.
func chainRemovals(rules []string, prefix string) [][]string {
	var jumps, flushes, chains [][]string
	for _, r := range rules {
		words := strings.Fields(r)
		switch {
		case len(words) == 2 && words[0] == "-N" && strings.HasPrefix(words[1], prefix):
			flushes = append(flushes, []string{"-F", words[1]})
			chains = append(chains, []string{"-X", words[1]})
		case len(words) > 2 && words[0] == "-A" && !strings.HasPrefix(words[1], "CNI-") && strings.HasPrefix(words[len(words)-1], prefix):
			jumps = append(jumps, append([]string{"-D"}, unquoted(words[1:])...))
		}
	}
	return append(append(jumps, flushes...), chains...)
}

// unquoted joins what iptables has put between quotation marks, the comments.
func unquoted(words []string) []string {
	var out []string
	inside := false
	for _, w := range words {
		text := strings.Trim(w, `"`)
		if inside {
			out[len(out)-1] += " " + text
		} else {
			out = append(out, text)
		}
		if strings.Count(w, `"`)%2 == 1 {
			inside = !inside
		}
	}
	return out
}
