// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package accept is the loop of a listener.
package accept

import (
	"context"
	"errors"
	"fmt"
	"net"
)

// Each calls serve with each connection until the listener is closed or ctx ends, which
// closes it; then it returns nil. serve owns the connection and must not block. what names
// a connection in an error.
func Each(ctx context.Context, l net.Listener, what string, serve func(net.Conn)) error {
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return fmt.Errorf("accept %s: %w", what, err)
		}
		serve(conn)
	}
}
