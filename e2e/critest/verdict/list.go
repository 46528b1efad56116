// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package verdict

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/errdefs"
)

// Entry is a spec that is known to fail.
type Entry struct {
	Spec string
	// Says is part of the failure's message, so that it fails for this reason and no other.
	Says string
	// Reason is why it fails, for people.
	Reason string
	// list is the name of its list, with the line.
	list string
}

// List is a list of specs that are known to fail.
type List []Entry

// separator stands between the columns; names of specs have bars and colons.
const separator = " ;; "

// ParseList reads a list: on each line a spec, part of its failure's message, and the
// reason, with " ;; " between; empty lines and those that begin with # count for nothing.
// All that is wrong is told at once.
func ParseList(name string, r io.Reader) (List, error) {
	var (
		list List
		errs []error
		seen = map[string]bool{}
	)
	s := bufio.NewScanner(r)
	for number := 1; s.Scan(); number++ {
		line := strings.TrimSpace(s.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		where := fmt.Sprintf("%s:%d", name, number)
		columns := strings.Split(line, separator)
		if len(columns) != 3 {
			errs = append(errs, fmt.Errorf("%s: %d columns, and not spec%[3]smessage%[3]sreason: %[4]w", where, len(columns), separator, errdefs.ErrInvalidArgument))
			continue
		}
		e := Entry{Spec: strings.TrimSpace(columns[0]), Says: strings.TrimSpace(columns[1]), Reason: strings.TrimSpace(columns[2]), list: where}
		if e.Spec == "" || e.Says == "" || e.Reason == "" {
			errs = append(errs, fmt.Errorf("%s: a column is empty: %w", where, errdefs.ErrInvalidArgument))
		}
		if seen[e.Spec] {
			errs = append(errs, fmt.Errorf("%s: %q stands there twice: %w", where, e.Spec, errdefs.ErrInvalidArgument))
		}
		seen[e.Spec] = true
		list = append(list, e)
	}
	return list, errors.Join(append(errs, s.Err())...)
}

// find returns the entry of a spec.
func (l List) find(spec string) (Entry, bool) {
	for _, e := range l {
		if e.Spec == spec {
			return e, true
		}
	}
	return Entry{}, false
}
