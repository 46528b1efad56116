// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package compat is the list of all that a pod can ask for through the CRI, with what
// happens to each by our handler. docs/compatibility.md is made from it. Its tests fail
// where the CRI has a field or a call that is not in it, where a test that is named is
// not there, and where the document is not what the list says.
package compat

import (
	"fmt"
	"strings"
)

// Fate is what happens to a request.
type Fate string

// Fates.
const (
	// Works: as by runc.
	Works Fate = "works"
	// InVM: works, and means the virtual machine where by runc it means the host.
	InVM Fate = "works in the VM"
	// Host: containerd itself does it, on the host, for every handler.
	Host Fate = "containerd's"
	// Partly: some of it works, and the rest is refused by name.
	Partly Fate = "partly"
	// Ignored: has no effect, and takes nothing from the container.
	Ignored Fate = "no effect"
	// Refused: an error that names it.
	Refused Fate = "refused"
	// Missing: refused by name for want of the feature.
	Missing Fate = "not yet"
)

// Entry is one request.
type Entry struct {
	// Name is a message and its field or a call as the CRI writes them, or for people.
	Name string
	Fate Fate
	// What says more, and why.
	What string
	// Tests prove it: names of tests in e2e, or of the packages' own as DIRECTORY:NAME.
	Tests []string
}

// Section is a part of the list.
type Section struct {
	Title, Intro string
	Entries      []Entry
}

// Sections are the whole list.
func Sections() []Section {
	return []Section{features, podFields, containerFields, calls}
}

// Markdown is the document.
func Markdown() string {
	var b strings.Builder
	b.WriteString(header)
	for _, s := range Sections() {
		fmt.Fprintf(&b, "\n## %s\n\n%s\n\n| | | | tests |\n|---|---|---|---|\n", s.Title, s.Intro)
		for _, e := range s.Entries {
			name := e.Name
			if !strings.Contains(name, " ") {
				name = "`" + name + "`"
			}
			fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", name, e.Fate, e.What, strings.Join(e.Tests, " "))
		}
	}
	return b.String()
}

const header = `<!-- Made from docs/compat by its test: go test ./docs/compat -update -->

# Compatibility

What a pod can ask for, and what happens to it in a virtual machine. The list is compared with the CRI's own
messages by a test: a field or a call that is not in it fails the build. The tests that are named run through the
CRI of a real containerd, most of them with runc beside us and compared with it.

- **works**: as by runc.
- **works in the VM**: it does what it says, to the pod's virtual machine where by runc it would be to the host.
- **containerd's**: containerd does it on the host, for every handler in the same way.
- **partly**: some of it works; the rest is an error that names the field, its value and what would be right.
- **no effect**: it is accepted, does nothing, and takes nothing from the container.
- **refused**: an error that names the field, its value and the reason. Nothing is made for such a pod or container.
- **not yet**: refused in the same way, for want of the feature.
`
