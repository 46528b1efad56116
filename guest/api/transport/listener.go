// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package transport

import (
	"context"
	"errors"
	"io"
	"net"
)

// ServeListener serves hosts that connect to l, one after another, as a
// virtio-serial port would, until ctx ends or l fails. It closes l. In tests it stands
// in for a VM.
func (m *Mux) ServeListener(ctx context.Context, l net.Listener) error {
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	defer l.Close() //nolint:errcheck // it fails only if it is closed
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return err
		}
		_ = m.serve(ctx, onceConn{conn}, func() error { return nil })
		_ = conn.Close()
	}
}

// onceConn is a connection as a device: a host that has gone does not come back,
// so the end of file is the device's failure.
type onceConn struct{ net.Conn }

func (c onceConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if errors.Is(err, io.EOF) {
		err = net.ErrClosed
	}
	return n, err
}
