// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package transport

import (
	"context"
	"fmt"
	"io"
	"net"
	"strings"

	"github.com/mdlayher/vsock"
)

// Vsock ports that the guest listens on, where its VMM has vsock. Each carries what
// a virtio-serial port carries elsewhere.
const (
	// VsockVM is the plugin's.
	VsockVM uint32 = 1024
	// VsockPod is the pod's shim's.
	VsockPod uint32 = 1025
)

// anyCID is VMADDR_CID_ANY: the VM's own CID may change with a restore.
const anyCID = 0xffffffff

// maxVsockAnswer bounds the VMM's answer to a connect, in bytes.
const maxVsockAnswer = 32

// connectVsock asks the VMM at the other end of conn for a port of its guest. The VMM
// closes conn when nobody listens there.
func connectVsock(conn net.Conn, port uint32) error {
	if _, err := fmt.Fprintf(conn, "CONNECT %d\n", port); err != nil {
		return fmt.Errorf("connect to the guest's vsock port %d: %w", port, err)
	}
	// What follows the answer is the guest's already, so not a byte more is read.
	var answer []byte
	var b [1]byte
	for b[0] != '\n' && len(answer) < maxVsockAnswer {
		if _, err := io.ReadFull(conn, b[:]); err != nil {
			return fmt.Errorf("connect to the guest's vsock port %d: nobody listens yet: %w", port, err)
		}
		answer = append(answer, b[0])
	}
	if !strings.HasPrefix(string(answer), "OK ") || b[0] != '\n' {
		return fmt.Errorf("connect to the guest's vsock port %d: the VMM answers %q", port, answer)
	}
	return nil
}

// ServeVsock serves hosts that connect to a vsock port, one after another, until ctx
// ends, and returns ctx's error. It needs /dev/vsock. Whoever is in the guest too is
// turned away.
func (m *Mux) ServeVsock(ctx context.Context, port uint32) error {
	l, err := vsock.ListenContextID(anyCID, port, nil)
	if err != nil {
		return fmt.Errorf("listen on vsock port %d: %w", port, err)
	}
	return m.ServeListener(ctx, hostsOnly{l})
}

// hostsOnly is a vsock listener that only the host gets through to.
type hostsOnly struct{ *vsock.Listener }

func (l hostsOnly) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if peer, ok := conn.RemoteAddr().(*vsock.Addr); ok && peer.ContextID == vsock.Host {
			return conn, nil
		}
		_ = conn.Close()
	}
}
