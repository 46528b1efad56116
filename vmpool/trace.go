// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmpool

import (
	"context"
	"errors"

	"github.com/containerd/containerd/v2/pkg/tracing"
)

// spanPrefix begins the names of our spans.
const spanPrefix = "cloudhv.pool"

// step runs fn in a span of its own, below that of ctx. What the pool does by
// itself, with a context without one, is a trace of its own.
func step(ctx context.Context, name string, fn func(context.Context) error) error {
	ctx, span := tracing.StartSpan(ctx, tracing.Name(spanPrefix, name))
	err := fn(ctx)
	span.SetStatus(err)
	span.End()
	return err
}

// endAcquire ends an Acquire's span. That there is nothing to give is no error.
func endAcquire(span *tracing.Span, vm *VM, err error) {
	span.SetAttributes(tracing.Attribute("outcome", string(outcomeOf(vm, err))))
	if vm != nil {
		span.SetAttributes(tracing.Attribute("vm.id", vm.ID()))
	}
	if errors.Is(err, ErrNone) {
		err = nil
	}
	span.SetStatus(err)
	span.End()
}
