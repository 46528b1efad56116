// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package forward connects the host to services in the pod: to ports of its
// localhost, which is the VM's.
package forward

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/accept"
	"github.com/cloudhv/containerd-cloudhv/guest/api"
	"github.com/cloudhv/containerd-cloudhv/guest/api/relay"
)

const (
	// maxConns bounds the connections: more than the host has, as it ends one first.
	maxConns = 2 * api.MaxForwards
	// requestLimit is how long a connection may take to say for which port it is.
	requestLimit = 10 * time.Second
	// dialLimit is how long a service may take to accept, which its kernel does for it
	// unless too many connections wait.
	dialLimit = 20 * time.Second
)

// localhost are the addresses that a service is looked for at, in order.
var localhost = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}

// Server serves api.PortForward.
type Server struct {
	slots chan struct{}
	// inPod runs a function in the pod's network namespace.
	inPod func(func() error) error
	// request and dial are requestLimit and dialLimit; tests shorten them.
	request, dial time.Duration
}

// NewServer returns a Server without connections. inPod runs a function, on one thread, in
// the pod's network namespace.
func NewServer(inPod func(func() error) error) *Server {
	return &Server{slots: make(chan struct{}, maxConns), inPod: inPod, request: requestLimit, dial: dialLimit}
}

// Serve accepts connections until the listener is closed or ctx ends. Those that it
// has accepted go on.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	return accept.Each(ctx, l, "a forward", func(conn net.Conn) {
		select {
		case s.slots <- struct{}{}:
			go func() {
				defer func() { <-s.slots }()
				s.serve(ctx, conn)
			}()
		default:
			log.G(ctx).WithField("limit", maxConns).Warn("too many forwarded connections: one was refused")
			go refuse(conn, api.ForwardBusy)
		}
	})
}

// serve carries one connection.
func (s *Server) serve(ctx context.Context, conn net.Conn) {
	logger := log.G(ctx)
	port, err := s.readRequest(conn)
	if err != nil {
		logger.WithError(err).Warn("forward refused")
		_ = conn.Close()
		return
	}
	var service *net.TCPConn
	err = s.inPod(func() (err error) {
		service, err = s.connect(ctx, port)
		return err
	})
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		refuse(conn, api.ForwardRefused)
		return
	case err != nil:
		logger.WithError(err).WithField("port", port).Warn("a forwarded port cannot be reached")
		refuse(conn, api.ForwardFailed)
		return
	}
	if _, err := conn.Write([]byte{api.ForwardAccepted}); err != nil {
		relay.Reset(service)
		_ = conn.Close()
		return
	}
	host, ok := conn.(relay.Conn)
	if !ok {
		logger.WithField("port", port).Errorf("a %T has no ends of its own for both directions", conn)
		relay.Reset(service)
		_ = conn.Close()
		return
	}
	if err := relay.Run(host, service); err != nil {
		logger.WithError(err).WithField("port", port).Debug("a forwarded connection was reset")
	}
}

// refuse answers and closes.
func refuse(conn net.Conn, answer byte) {
	_, _ = conn.Write([]byte{answer})
	_ = conn.Close()
}

func (s *Server) readRequest(conn net.Conn) (uint16, error) {
	if err := conn.SetReadDeadline(time.Now().Add(s.request)); err != nil {
		return 0, fmt.Errorf("limit the request of a forward: %w", err)
	}
	var req [api.ForwardRequestBytes]byte
	if _, err := io.ReadFull(conn, req[:]); err != nil {
		return 0, fmt.Errorf("read the request of a forward: %w", err)
	}
	if err := conn.SetReadDeadline(time.Time{}); err != nil {
		return 0, fmt.Errorf("lift the limit of a forward: %w", err)
	}
	return binary.BigEndian.Uint16(req[:]), nil
}

// connect connects to a port of localhost. If nobody listens at any of its addresses,
// or the VM has none such, the error is ECONNREFUSED.
func (s *Server) connect(ctx context.Context, port uint16) (*net.TCPConn, error) {
	if port == 0 {
		return nil, unix.ECONNREFUSED // and to the kernel it is no port
	}
	dialer := net.Dialer{Timeout: s.dial}
	var errs []error
	for _, addr := range localhost {
		conn, err := dialer.DialContext(ctx, "tcp", netip.AddrPortFrom(addr, port).String())
		if err == nil {
			return conn.(*net.TCPConn), nil
		}
		if !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.EADDRNOTAVAIL) && !errors.Is(err, unix.EAFNOSUPPORT) {
			errs = append(errs, err)
		}
	}
	if len(errs) == 0 {
		return nil, unix.ECONNREFUSED
	}
	return nil, fmt.Errorf("connect to port %d: %w", port, errors.Join(errs...))
}
