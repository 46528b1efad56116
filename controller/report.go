// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/pkg/tracing"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/protobuf/types/known/emptypb"

	hostv1 "github.com/cloudhv/containerd-cloudhv/controller/hostapi/v1"
	shimapi "github.com/cloudhv/containerd-cloudhv/controller/shim"
)

// Report implements hostv1.HostService. Its spans are below the one that
// containerd had when it called the shim.
func (h *HostService) Report(ctx context.Context, req *hostv1.ReportRequest) (*emptypb.Empty, error) {
	if _, err := h.c.get(req.GetSandboxId()); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	r := readReport(req)
	r.count()
	r.trace(callersTrace(ctx))
	return &emptypb.Empty{}, nil
}

// report is what a shim tells of a call, brought into bounds: some of it is a
// guest's.
type report struct {
	sandbox, container, call string
	failed                   bool
	began                    time.Time
	took                     time.Duration
	parts                    []reportPart
}

type reportPart struct {
	name     string
	at, took time.Duration
	guest    bool
}

// usec is a duration of at most limit.
func usec(n uint64, limit time.Duration) time.Duration {
	return time.Duration(min(n, uint64(limit/time.Microsecond))) * time.Microsecond
}

func readReport(req *hostv1.ReportRequest) *report {
	r := &report{
		sandbox: req.GetSandboxId(), container: printable(req.GetContainerId(), maxGuestText),
		call: req.GetCall(), failed: req.GetFailed(),
		began: time.Unix(0, req.GetBeganUnixNano()), took: usec(req.GetTookUsec(), time.Hour),
	}
	answered := r.took // when the guest had, at the latest
	for _, p := range req.GetParts()[:min(len(req.GetParts()), maxGuestSteps)] {
		end := r.took
		if p.GetGuest() {
			end = answered
		}
		at := usec(p.GetAtUsec(), end)
		part := reportPart{name: printable(p.GetName(), maxGuestText), at: at, took: usec(p.GetTookUsec(), end-at), guest: p.GetGuest()}
		if !part.guest && part.name == shimapi.PartGuest {
			answered = part.at + part.took
		}
		r.parts = append(r.parts, part)
	}
	return r
}

// count counts a call. A name that is not known is no label's value.
func (r *report) count() {
	if !slices.Contains(taskCalls, r.call) {
		return
	}
	if r.failed {
		taskCounter.WithValues(r.call, resultError).Inc()
		return
	}
	taskCounter.WithValues(r.call, resultOK).Inc()
	taskTimer.WithValues(r.call).Update(r.took)
	for _, p := range r.parts {
		if !p.guest && slices.Contains(taskParts, p.name) {
			taskPartTimer.WithValues(p.name).Update(p.took)
		}
	}
}

// trace makes the call's spans below that of ctx. What the guest told is below the
// part that waited for the guest.
func (r *report) trace(ctx context.Context) {
	if !trace.SpanContextFromContext(ctx).IsValid() {
		return
	}
	call := printable(r.call, maxGuestText)
	ctx = pastSpan(ctx, tracing.Name(spanPrefix, "task", call), r.began, r.took, attribute.String("sandbox.id", r.sandbox),
		attribute.String("container.id", r.container), attribute.Bool("error", r.failed))
	inGuest := ctx
	for _, p := range r.parts {
		if p.guest {
			pastSpan(inGuest, tracing.Name(spanPrefix, "guest", p.name), r.began.Add(p.at), p.took)
			continue
		}
		below := pastSpan(ctx, tracing.Name(spanPrefix, "task", call, p.name), r.began.Add(p.at), p.took)
		if p.name == shimapi.PartGuest {
			inGuest = below
		}
	}
}

// callersTrace gives a context with the trace context that came in a request's
// metadata, which is the shim's caller's.
func callersTrace(ctx context.Context) context.Context {
	ctx = trace.ContextWithSpanContext(ctx, trace.SpanContext{})
	md, _ := ttrpc.GetMetadata(ctx)
	headers := propagation.MapCarrier{}
	for _, key := range shimapi.TraceHeaders {
		if v, ok := md.Get(key); ok && len(v) > 0 {
			headers.Set(key, v[0])
		}
	}
	return propagation.TraceContext{}.Extract(ctx, headers)
}
