// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"

	"github.com/containerd/log"

	"github.com/cloudhv/containerd-cloudhv/guest/api"
	"github.com/cloudhv/containerd-cloudhv/guest/api/transport"
)

// ports are the listeners of api.PortRPC, api.PortStream and api.PortForward.
type ports struct{ rpc, stream, forward net.Listener }

// listen listens on the transport that the VMM gave to this VM: vsock, if there
// is no virtio-serial port.
func listen(ctx context.Context) (p ports, err error) {
	mux := transport.NewMux()
	for _, l := range []struct {
		to   *net.Listener
		port uint32
	}{{&p.rpc, api.PortRPC}, {&p.stream, api.PortStream}, {&p.forward, api.PortForward}} {
		if *l.to, err = mux.Listen(l.port); err != nil {
			return p, err
		}
	}
	if useVsock() {
		for _, port := range []uint32{transport.VsockVM, transport.VsockPod} {
			serveTransport(ctx, fmt.Sprint("vsock ", port), func() error { return mux.ServeVsock(ctx, port) })
		}
		return p, nil
	}
	for _, name := range []string{transport.PortVM, transport.PortPod} {
		serveTransport(ctx, name, func() error { return mux.ServeDevice(ctx, name) })
	}
	return p, nil
}

func useVsock() bool {
	entries, err := os.ReadDir("/sys/class/virtio-ports")
	if err == nil && len(entries) > 0 {
		return false
	}
	_, err = os.Stat("/dev/vsock")
	return !errors.Is(err, fs.ErrNotExist)
}

// serveTransport runs one way to the host.
func serveTransport(ctx context.Context, name string, run func() error) {
	go func() {
		if err := run(); err != nil {
			log.G(ctx).WithError(err).WithField("port", name).Error("transport ended")
		}
	}()
}
