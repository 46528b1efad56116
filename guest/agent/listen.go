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
	"github.com/mdlayher/vsock"

	"github.com/cloudhv/containerd-cloudhv/guest/api"
	"github.com/cloudhv/containerd-cloudhv/guest/api/transport"
)

// ports are the listeners of api.PortRPC and api.PortStream.
type ports struct{ rpc, stream net.Listener }

// listen listens on the transport that the VMM gave to this VM: vsock, if there
// is no virtio-serial port.
func listen(ctx context.Context) (ports, error) {
	if useVsock() {
		return listenVsock()
	}
	return listenSerial(ctx)
}

func useVsock() bool {
	entries, err := os.ReadDir("/sys/class/virtio-ports")
	if err == nil && len(entries) > 0 {
		return false
	}
	_, err = os.Stat("/dev/vsock")
	return !errors.Is(err, fs.ErrNotExist)
}

func listenVsock() (p ports, err error) {
	for _, l := range []struct {
		port uint32
		to   *net.Listener
	}{{api.PortRPC, &p.rpc}, {api.PortStream, &p.stream}} {
		if *l.to, err = vsock.ListenContextID(vsockAnyCID, l.port, nil); err != nil {
			return p, fmt.Errorf("listen on vsock port %d: %w", l.port, err)
		}
	}
	return p, nil
}

// vsockAnyCID is VMADDR_CID_ANY: the VM's own CID changes with a restore.
const vsockAnyCID = 0xffffffff

func listenSerial(ctx context.Context) (p ports, err error) {
	mux := transport.NewMux()
	if p.rpc, err = mux.Listen(api.PortRPC); err != nil {
		return p, err
	}
	if p.stream, err = mux.Listen(api.PortStream); err != nil {
		return p, err
	}
	for _, name := range []string{transport.PortVM, transport.PortPod} {
		go func() {
			if err := mux.ServeDevice(ctx, name); err != nil {
				log.G(ctx).WithError(err).WithField("port", name).Error("transport ended")
			}
		}()
	}
	return p, nil
}
