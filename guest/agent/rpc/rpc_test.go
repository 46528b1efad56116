// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package rpc

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestToStatus(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		err  error
		code codes.Code
	}{
		{fmt.Errorf("x: %w", errdefs.ErrNotFound), codes.NotFound},
		{fmt.Errorf("x: %w", errdefs.ErrInvalidArgument), codes.InvalidArgument},
		{errors.Join(errors.New("y"), errdefs.ErrFailedPrecondition), codes.FailedPrecondition},
		{fmt.Errorf("x: %w", context.DeadlineExceeded), codes.DeadlineExceeded},
		{context.Canceled, codes.Canceled},
		{errors.New("plain"), codes.Unknown},
		{status.Error(codes.Internal, "own"), codes.Internal},
	} {
		require.Equal(t, tc.code, status.Code(toStatus(tc.err)), "%v", tc.err)
	}
	long := status.Convert(toStatus(errors.New(strings.Repeat("ä\xff", maxMessage)))).Message()
	require.True(t, utf8.ValidString(long))
	require.LessOrEqual(t, len(long), maxMessage+2)
}

func TestPanicEndsItsRequestOnly(t *testing.T) {
	t.Parallel()
	_, err := intercept(t.Context(), nil, &ttrpc.UnaryServerInfo{FullMethod: "/x.Task/Create"}, func(context.Context, func(any) error) (any, error) {
		panic("boom")
	})
	require.Equal(t, codes.Internal, status.Code(err))
	require.NotContains(t, err.Error(), "boom")
}
