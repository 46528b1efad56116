// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package verdict

import (
	"fmt"
	"io"
	"text/tabwriter"
)

// Print writes how many specs passed, failed and were skipped by each handler, after a
// line for each that did not pass by all, with why it is known to fail.
func Print(w io.Writer, runs ...Run) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	results := make([]Results, len(runs))
	for i, r := range runs {
		results[i] = r.Results
		fmt.Fprintf(t, "%s\t", r.Handler)
	}
	fmt.Fprintf(t, "spec\n")
	for _, spec := range specs(results...) {
		states, reason, differs := make([]State, len(runs)), "", false
		for i, r := range runs {
			states[i] = r.Results[spec].State
			differs = differs || states[i] == Failed || states[i] != states[0]
			if e, ok := r.find(spec); ok {
				reason = " (" + e.Reason + ")"
			}
		}
		if !differs {
			continue
		}
		for _, s := range states {
			fmt.Fprintf(t, "%s\t", s)
		}
		fmt.Fprintf(t, "%s%s\n", spec, reason)
	}
	fmt.Fprintln(t)
	for _, r := range runs {
		fmt.Fprintf(t, "%s\t", r.Handler)
	}
	fmt.Fprintln(t)
	for _, s := range []State{Passed, Failed, Skipped} {
		for _, r := range runs {
			fmt.Fprintf(t, "%d\t", r.Results.Count(s))
		}
		fmt.Fprintf(t, "%s\n", s)
	}
	return t.Flush()
}
