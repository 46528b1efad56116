// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/pkg/tracing"
	"github.com/containerd/log"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"
)

// spanPrefix begins the names of our spans.
const spanPrefix = "cloudhv"

// Phase is one part of a sandbox's start. Phases may overlap.
type Phase struct {
	Name string `json:"name"`
	// AtUsec is when it began, since Start was called; TookUsec how long it took. Microseconds.
	AtUsec   int64 `json:"at_usec"`
	TookUsec int64 `json:"took_usec"`
}

// guestPhase begins the names of phases that a guest has told of.
const guestPhase = "guest: "

// stopwatch notes the phases of a verb. It may be used concurrently.
type stopwatch struct {
	of    *verb
	start time.Time
	span  trace.Span

	mu     sync.Mutex
	phases []Phase
}

// begin begins a verb on a sandbox, and a span that has those of its phases.
func begin(ctx context.Context, of *verb, id string) (context.Context, *stopwatch) {
	ctx, _ = tracing.StartSpan(ctx, tracing.Name(spanPrefix, of.name), tracing.WithAttribute("sandbox.id", id))
	return ctx, &stopwatch{of: of, start: time.Now(), span: trace.SpanFromContext(ctx)}
}

// end ends the verb's span, which is that of ctx.
func (s *stopwatch) end(ctx context.Context, err error) {
	span := tracing.SpanFromContext(ctx)
	span.SetStatus(err)
	span.End()
}

// time runs fn as a phase: a span in the trace, a line in the debug log, an
// entry in Status, a sample in the metrics.
func (s *stopwatch) time(ctx context.Context, name string, fn func(context.Context) error) error {
	ctx, span := tracing.StartSpan(ctx, tracing.Name(spanPrefix, s.of.name, name))
	begin := time.Now()
	err := fn(ctx)
	took := time.Since(begin)
	span.SetStatus(err)
	span.End()
	s.add(name, begin.Sub(s.start), took)
	s.of.phases.WithValues(name).Update(took)
	// What ended because something beside it failed, or the caller left, is no failure of its own.
	if err != nil && ctx.Err() == nil {
		s.of.failures.WithValues(name).Inc()
	}
	log.G(ctx).WithFields(log.Fields{"phase": name, "duration": took}).Debug(s.of.name + " phase")
	return err
}

// guest notes what a guest has told of, which began at since the start: an entry
// in Status, a span below that of ctx. Its name, which is the guest's, is no
// metric's.
func (s *stopwatch) guest(ctx context.Context, name string, at, took time.Duration) {
	s.add(guestPhase+name, at, took)
	pastSpan(ctx, tracing.Name(spanPrefix, "guest", name), s.start.Add(at), took)
}

// past notes a phase that began at the time given and is over, however it ended.
func (s *stopwatch) past(name string, began time.Time) {
	took := time.Since(began)
	s.add(name, began.Sub(s.start), took)
	s.of.phases.WithValues(name).Update(took)
}

func (s *stopwatch) add(name string, at, took time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.phases = append(s.phases, Phase{Name: name, AtUsec: at.Microseconds(), TookUsec: took.Microseconds()})
}

// since is how long ago a phase began that has ended.
func (s *stopwatch) since(name string) time.Duration {
	for _, p := range s.list() {
		if p.Name == name {
			return time.Since(s.start) - time.Duration(p.AtUsec)*time.Microsecond
		}
	}
	return 0
}

// list gives the phases in the order they began.
func (s *stopwatch) list() []Phase {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := slices.Clone(s.phases)
	slices.SortStableFunc(list, func(a, b Phase) int { return int(a.AtUsec - b.AtUsec) })
	return list
}

// phasesText is one line about our own phases, in milliseconds.
func phasesText(phases []Phase) string {
	var parts []string
	for _, p := range phases {
		if !strings.HasPrefix(p.Name, guestPhase) {
			parts = append(parts, fmt.Sprintf("%s %.1f ms", p.Name, float64(p.TookUsec)/1000))
		}
	}
	return strings.Join(parts, ", ")
}

// pastSpan makes a span of what is over, below that of ctx, and returns a context
// for spans below it. Where there is no trace it does nothing.
func pastSpan(ctx context.Context, name string, began time.Time, took time.Duration, attrs ...attribute.KeyValue) context.Context {
	if !trace.SpanContextFromContext(ctx).IsValid() {
		return ctx
	}
	ctx, span := otel.Tracer("").Start(ctx, name, trace.WithTimestamp(began), trace.WithAttributes(attrs...))
	span.End(trace.WithTimestamp(began.Add(took)))
	return ctx
}

// untraced gives a context for what is not part of the request in whose course it
// begins: neither its end nor its trace are the request's.
func untraced(ctx context.Context) context.Context {
	return trace.ContextWithSpanContext(context.WithoutCancel(ctx), trace.SpanContext{})
}
