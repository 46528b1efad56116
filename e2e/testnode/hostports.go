// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testnode

import (
	"errors"
	"os"
	"os/exec"
	"strings"
)

// The CNI plugin portmap removes a pod's rules with the pod, but never the chains that
// lead to them. The node removes those, if they came with it: a file says so, by which a
// next node of the name knows it too.

// portmapChains is how the names of the plugin's common chains begin.
const portmapChains = "CNI-HOSTPORT-"

// natRules lists the rules of the family's nat table, as iptables takes them; none
// where it cannot be asked.
func (f ipFamily) natRules() []string {
	out, err := exec.Command(f.program, "-w", "-t", "nat", "-S").Output()
	if err != nil {
		return nil
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

// ownPortmap notes which families have none of portmap's chains yet.
func (n *Node) ownPortmap() error {
	if !n.opts.HostPorts {
		return nil
	}
	var own []string
	for _, f := range ipFamilies {
		if !strings.Contains(strings.Join(f.natRules(), "\n"), portmapChains) {
			own = append(own, f.program)
		}
	}
	return os.WriteFile(n.Dir(portmapFile), []byte(strings.Join(own, "\n")), 0o644)
}

const portmapFile = "portmap"

// removePortmap removes the chains that came with this node, or an earlier one of
// its name.
func (n *Node) removePortmap() error {
	own, err := os.ReadFile(n.Dir(portmapFile))
	if err != nil {
		return nil
	}
	var errs []error
	for _, f := range ipFamilies {
		if !strings.Contains("\n"+string(own)+"\n", "\n"+f.program+"\n") {
			continue
		}
		for _, args := range portmapRemovals(f.natRules()) {
			errs = append(errs, command(f.program, append([]string{"-w", "-t", "nat"}, args...)...))
		}
	}
	return errors.Join(errs...)
}

// portmapRemovals are iptables' arguments that remove portmap's common chains from a
// nat table with these rules: first what leads to them, then what is in them, then they.
func portmapRemovals(rules []string) [][]string {
	var jumps, flushes, chains [][]string
	for _, r := range rules {
		words := strings.Fields(r)
		switch {
		case len(words) == 2 && words[0] == "-N" && strings.HasPrefix(words[1], portmapChains):
			flushes = append(flushes, []string{"-F", words[1]})
			chains = append(chains, []string{"-X", words[1]})
		case len(words) > 2 && words[0] == "-A" && !strings.HasPrefix(words[1], "CNI-") && strings.HasPrefix(words[len(words)-1], portmapChains):
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
