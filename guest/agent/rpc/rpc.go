// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package rpc is the edge of the agent's ttrpc services: a request that panics
// ends alone, and errors become status codes, bounded.
package rpc

import (
	"context"
	"fmt"
	"runtime/debug"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// maxMessage bounds an error's text, in bytes.
	maxMessage = 4 << 10
	// slow requests are logged.
	slow = 2 * time.Second
)

// NewServer returns a server to register services with.
func NewServer() (*ttrpc.Server, error) {
	s, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(intercept))
	if err != nil {
		return nil, fmt.Errorf("make ttrpc server: %w", err)
	}
	return s, nil
}

func intercept(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method) (_ any, err error) {
	name := info.FullMethod[strings.LastIndexByte(info.FullMethod, '/')+1:]
	ctx = log.WithLogger(ctx, log.L.WithField("call", name))
	began := time.Now()
	defer func() {
		if p := recover(); p != nil {
			log.G(ctx).Errorf("panic: %v: %s", p, debug.Stack())
			err = toStatus(fmt.Errorf("the agent failed at %s: %w", name, errdefs.ErrInternal))
		}
	}()
	resp, err := method(ctx, unmarshal)
	d := time.Since(began)
	if err != nil {
		log.G(ctx).WithField("ms", d.Milliseconds()).WithError(err).Info("request failed")
		return nil, toStatus(err)
	}
	if d > slow && name != "Wait" {
		log.G(ctx).WithField("ms", d.Milliseconds()).Info("slow request")
	}
	return resp, nil
}

// byClass maps errdefs' classes to codes. errgrpc.ToGRPC would do the same, but
// attaches each wrapped error as a detail, which nothing on the host reads and
// which has no bound.
var byClass = map[error]codes.Code{
	errdefs.ErrInvalidArgument:    codes.InvalidArgument,
	errdefs.ErrNotFound:           codes.NotFound,
	errdefs.ErrAlreadyExists:      codes.AlreadyExists,
	errdefs.ErrPermissionDenied:   codes.PermissionDenied,
	errdefs.ErrResourceExhausted:  codes.ResourceExhausted,
	errdefs.ErrFailedPrecondition: codes.FailedPrecondition,
	errdefs.ErrAborted:            codes.Aborted,
	errdefs.ErrNotImplemented:     codes.Unimplemented,
	errdefs.ErrInternal:           codes.Internal,
	errdefs.ErrUnavailable:        codes.Unavailable,
	context.DeadlineExceeded:      codes.DeadlineExceeded,
	context.Canceled:              codes.Canceled,
}

// toStatus returns err as a status whose text is bounded valid UTF-8.
func toStatus(err error) error {
	if _, ok := status.FromError(err); ok {
		return err // From ttrpc itself: the request could not be decoded.
	}
	code, ok := byClass[errdefs.Resolve(err)]
	if !ok {
		code = codes.Unknown
	}
	msg := err.Error()
	if len(msg) > maxMessage {
		msg = msg[:maxMessage]
	}
	return status.Error(code, strings.ToValidUTF8(msg, "?"))
}
