// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package ctlapi is the client of the service by which a node's virtual machines
// are looked at and its pool is tended, on containerd's own socket.
package ctlapi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	ctlv1 "github.com/cloudhv/containerd-cloudhv/controller/ctlapi/v1"
)

// DefaultAddress is containerd's socket.
const DefaultAddress = "/run/containerd/containerd.sock"

// maxAnswer bounds one message, in bytes.
const maxAnswer = 16 << 20

// Client calls the service. Its methods may be called concurrently, and wait for as
// long as their context lets them. Their errors are those of errdefs, but for those of
// the stream that Console returns: CopyConsole has them too. ErrNotImplemented means
// that the containerd there has no such service.
type Client struct {
	ctlv1.ControlClient
	conn *grpc.ClientConn
}

// Dial connects to the containerd that listens at a path, which may begin with
// unix://. An error is that of the socket: fs.ErrNotExist, fs.ErrPermission, or
// unix.ECONNREFUSED if nobody listens.
func Dial(ctx context.Context, address string) (*Client, error) {
	path := strings.TrimPrefix(address, "unix://")
	// gRPC would tell what is wrong with the socket in words only.
	dialer := &net.Dialer{}
	first, err := dialer.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	if err := first.Close(); err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient("passthrough:///"+path,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, path string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", path)
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)),
		grpc.WithUnaryInterceptor(native),
	)
	if err != nil {
		return nil, fmt.Errorf("connect to containerd at %s: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	return &Client{ControlClient: ctlv1.NewControlClient(conn), conn: conn}, nil
}

// native gives an answer's error the class that it has in errdefs.
func native(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, call grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	return errgrpc.ToNative(call(ctx, method, req, reply, conn, opts...))
}

// CopyConsole writes a VM's console log to w, as the guest printed it, and returns
// whose it is: the ID of the VM, and of its pod if it has one.
func (c *Client) CopyConsole(ctx context.Context, w io.Writer, req *ctlv1.ConsoleRequest) (vmID, podID string, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.Console(ctx, req)
	if err != nil {
		return "", "", errgrpc.ToNative(err)
	}
	for {
		part, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return vmID, podID, nil
		case err != nil:
			return vmID, podID, errgrpc.ToNative(err)
		}
		if part.GetVmId() != "" || part.GetPodId() != "" {
			vmID, podID = part.GetVmId(), part.GetPodId()
		}
		if _, err := w.Write(part.GetData()); err != nil {
			return vmID, podID, err
		}
	}
}

// Close ends the connection, and the calls under way with it.
func (c *Client) Close() error { return c.conn.Close() }
