// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package verdict reads what two runs of the CRI validation suite reported, and says
// whether the one may differ from the other as it does.
package verdict

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// State is how a spec ended.
type State string

// Every other state of Ginkgo's, such as a time limit or a panic, is Failed.
const (
	Passed  State = "passed"
	Failed  State = "failed"
	Skipped State = "skipped"
)

// Result is one spec's.
type Result struct {
	State State
	// Message is what a failed spec says, or why one skipped itself.
	Message string
	Took    time.Duration
}

// Results are those of a run, by the specs' full names.
type Results map[string]Result

// Count is how many ended so.
func (r Results) Count(s State) int {
	n := 0
	for _, x := range r {
		if x.State == s {
			n++
		}
	}
	return n
}

// ginkgoReport is what is of interest in a report of Ginkgo's (--json-report).
type ginkgoReport struct {
	SuiteDescription           string
	SpecialSuiteFailureReasons []string
	SpecReports                []ginkgoSpec
}

type ginkgoSpec struct {
	ContainerHierarchyTexts []string
	LeafNodeType            string
	LeafNodeText            string
	State                   string
	RunTime                 time.Duration
	Failure                 ginkgoFailure
}

type ginkgoFailure struct {
	Message        string
	ForwardedPanic string
}

// Parse reads Ginkgo's JSON. It returns ErrInvalidArgument for what is no report of
// one suite with specs, and an error if something failed that is no spec, as then
// the results say nothing.
func Parse(r io.Reader) (Results, error) {
	var reports []ginkgoReport
	if err := json.NewDecoder(r).Decode(&reports); err != nil {
		return nil, fmt.Errorf("reading the suite's report: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(reports) != 1 {
		return nil, fmt.Errorf("the report is of %d suites and not of one: %w", len(reports), errdefs.ErrInvalidArgument)
	}
	results := Results{}
	for _, s := range reports[0].SpecReports {
		if s.LeafNodeType != "It" {
			if st := s.state(); st == Failed {
				return nil, fmt.Errorf("%s of the suite failed: %s: %w", s.LeafNodeType, s.message(), errdefs.ErrFailedPrecondition)
			}
			continue
		}
		name := s.name()
		if _, ok := results[name]; ok {
			return nil, fmt.Errorf("the report has two specs %q: %w", name, errdefs.ErrInvalidArgument)
		}
		results[name] = Result{State: s.state(), Message: s.message(), Took: s.RunTime}
	}
	if len(results) == 0 {
		return nil, fmt.Errorf("the report has no specs (%s): %w", strings.Join(reports[0].SpecialSuiteFailureReasons, ", "), errdefs.ErrInvalidArgument)
	}
	return results, nil
}

func (s ginkgoSpec) name() string {
	return strings.Join(append(s.ContainerHierarchyTexts, s.LeafNodeText), " ")
}

func (s ginkgoSpec) state() State {
	switch s.State {
	case "passed":
		return Passed
	case "skipped", "pending":
		return Skipped
	}
	return Failed
}

func (s ginkgoSpec) message() string {
	text := s.Failure.Message
	if s.Failure.ForwardedPanic != "" {
		text += ": " + s.Failure.ForwardedPanic
	}
	if text == "" && s.state() == Failed {
		text = s.State
	}
	return text
}
