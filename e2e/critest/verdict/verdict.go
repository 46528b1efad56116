// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package verdict

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Run is what one handler did, and what it is known to fail.
type Run struct {
	Handler string
	Results Results
	// Known may have an entry in one of its lists for each spec that fails.
	Known []List
}

func (r Run) find(spec string) (Entry, bool) {
	for _, l := range r.Known {
		if e, ok := l.find(spec); ok {
			return e, true
		}
	}
	return Entry{}, false
}

// Judge compares a run with the yardstick's, and returns all that must not be, a
// sentence each; nothing if all is well:
//
//   - the yardstick fails a spec that is not listed for it;
//   - ours fails, or skips, what the yardstick passes, and it is not listed;
//   - ours fails what the yardstick skips, and it is not listed;
//   - a listed spec passes, fails or skips itself with another message, or does not exist.
//
// What the yardstick fails, as listed, is not held against ours.
func Judge(yardstick, ours Run) []string {
	var wrong []string
	for _, spec := range specs(yardstick.Results, ours.Results) {
		y, o := yardstick.Results[spec], ours.Results[spec]
		if p := ofKnown(yardstick, spec); p != "" {
			wrong = append(wrong, p)
		} else if _, listed := yardstick.find(spec); y.State == Failed && !listed {
			wrong = append(wrong, fmt.Sprintf("%s fails on %s itself: %s", spec, yardstick.Handler, brief(y.Message)))
		}
		if p := ofKnown(ours, spec); p != "" {
			wrong = append(wrong, p)
			continue
		}
		if _, listed := ours.find(spec); listed {
			continue
		}
		switch {
		case y.State == Failed:
		case o.State == Failed:
			wrong = append(wrong, fmt.Sprintf("%s: %s on %s, fails on %s: %s", spec, y.State, yardstick.Handler, ours.Handler, brief(o.Message)))
		case y.State == Passed && o.State != Passed:
			wrong = append(wrong, fmt.Sprintf("%s: passed on %s, not run on %s: %s", spec, yardstick.Handler, ours.Handler, brief(o.Message)))
		}
	}
	return append(append(wrong, stale(yardstick)...), stale(ours)...)
}

// ofKnown says what is wrong with a spec that is listed as failing, if it is.
func ofKnown(r Run, spec string) string {
	e, ok := r.find(spec)
	if !ok {
		return ""
	}
	switch x := r.Results[spec]; {
	case x.State == Passed:
		return fmt.Sprintf("%s passes on %s: take it off the list (%s)", spec, r.Handler, e.list)
	// What was skipped from outside has nothing to say.
	case (x.State == Failed || x.Message != "") && !strings.Contains(x.Message, e.Says):
		return fmt.Sprintf("%s: %s on %s, but does not say %q (%s): %s", spec, x.State, r.Handler, e.Says, e.list, brief(x.Message))
	}
	return ""
}

// stale names the entries whose spec does not exist.
func stale(r Run) []string {
	var wrong []string
	for _, l := range r.Known {
		for _, e := range l {
			if _, ok := r.Results[e.Spec]; !ok {
				wrong = append(wrong, fmt.Sprintf("%s: the suite has no spec %q", e.list, e.Spec))
			}
		}
	}
	return wrong
}

// specs are the names of all, sorted.
func specs(results ...Results) []string {
	all := map[string]bool{}
	for _, r := range results {
		for name := range r {
			all[name] = true
		}
	}
	return slices.Sorted(maps.Keys(all))
}

// briefLimit is how much of a message is shown, in bytes.
const briefLimit = 600

// brief is a message on one line, and its end if it is long: what went wrong stands there.
func brief(message string) string {
	text := strings.Join(strings.Fields(message), " ")
	if len(text) > briefLimit {
		text = "… " + strings.ToValidUTF8(text[len(text)-briefLimit:], "")
	}
	return text
}
