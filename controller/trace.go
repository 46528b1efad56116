// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/pkg/tracing"
	"github.com/containerd/log"
)

// Phase is one part of a sandbox's start. Phases may overlap.
type Phase struct {
	Name string `json:"name"`
	// AtUsec is when it began, since Start was called; TookUsec how long it took. Microseconds.
	AtUsec   int64 `json:"at_usec"`
	TookUsec int64 `json:"took_usec"`
}

// stopwatch notes phases. It may be used concurrently.
type stopwatch struct {
	start time.Time

	mu     sync.Mutex
	phases []Phase
}

func newStopwatch() *stopwatch {
	return &stopwatch{start: time.Now()}
}

// time runs fn as a phase: a span in the trace, a line in the debug log, an
// entry in Status, a sample in the metrics.
func (s *stopwatch) time(ctx context.Context, name string, fn func(context.Context) error) error {
	ctx, span := tracing.StartSpan(ctx, tracing.Name("cloudhv", "sandbox", name))
	begin := time.Now()
	err := fn(ctx)
	took := time.Since(begin)
	span.SetStatus(err)
	span.End()
	s.add(name, begin.Sub(s.start), took)
	phaseTimer.WithValues(name).Update(took)
	log.G(ctx).WithFields(log.Fields{"phase": name, "duration": took}).Debug("start phase")
	return err
}

func (s *stopwatch) add(name string, at, took time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.phases = append(s.phases, Phase{Name: name, AtUsec: at.Microseconds(), TookUsec: took.Microseconds()})
}

// list gives the phases in the order they began.
func (s *stopwatch) list() []Phase {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := slices.Clone(s.phases)
	slices.SortStableFunc(list, func(a, b Phase) int { return int(a.AtUsec - b.AtUsec) })
	return list
}
