// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/api"
	"github.com/cloudhv/containerd-cloudhv/guest/api/relay"
)

const (
	// carryLimit is how long a port-forward may wait for the guest's answer, which
	// gives a service twice 20 s.
	carryLimit = 50 * time.Second
	// maxForwardDials bounds the port-forwards that wait for it, so that other
	// streams of the guest always find a place.
	maxForwardDials = 32
	// acceptPause is how long a listener rests that cannot accept, as file descriptors
	// have run out.
	acceptPause = 100 * time.Millisecond
	// tellEvery keeps what may come with each connection from filling the log.
	tellEvery = 10 * time.Second
)

// errRefused means that nobody listens on the port in the pod.
var errRefused = errors.New("the pod has no service on this port")

// forwarder carries connections from the host to the pod's localhost: those that
// its listeners get, whatever port they were made to. A connection that cannot be
// carried is reset.
type forwarder struct {
	svc *service
	// ctx ends with close.
	ctx    context.Context
	cancel context.CancelFunc
	// slots are the connections, dials those that wait for the guest's answer.
	slots, dials chan struct{}

	mu        sync.Mutex
	listeners []*net.TCPListener
	told      time.Time // when the log last said something of a kind that repeats
}

func newForwarder(s *service) *forwarder {
	f := &forwarder{svc: s, slots: make(chan struct{}, api.MaxForwards), dials: make(chan struct{}, maxForwardDials)}
	f.ctx, f.cancel = context.WithCancel(s.ctx)
	return f
}

// serve accepts connections until close. It closes the listeners.
func (f *forwarder) serve(listeners []*net.TCPListener) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ctx.Err() != nil {
		closeAll(listeners)
		return
	}
	f.listeners = listeners
	for _, l := range listeners {
		f.svc.running.Go(func() { f.accept(l) })
	}
}

// close ends accepting, and resets the connections: as long as there is one the pod's
// network namespace stays.
func (f *forwarder) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.cancel()
	closeAll(f.listeners)
	f.listeners = nil
}

func closeAll(listeners []*net.TCPListener) {
	for _, l := range listeners {
		_ = l.Close()
	}
}

func (f *forwarder) accept(l *net.TCPListener) {
	for {
		conn, err := l.AcceptTCP()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			f.tell(err, "cannot accept a port-forward")
			if !sleep(f.ctx, acceptPause) {
				return
			}
			continue
		}
		select {
		case f.slots <- struct{}{}:
			f.svc.running.Go(func() {
				defer func() { <-f.slots }()
				f.carry(conn)
			})
		default:
			relay.Reset(conn)
			f.tell(fmt.Errorf("%d connections are open: %w", cap(f.slots), errdefs.ErrResourceExhausted), "a port-forward was reset")
		}
	}
}

// tell logs a warning, unless it has just done so.
func (f *forwarder) tell(err error, what string) {
	f.mu.Lock()
	quiet := f.ctx.Err() != nil || time.Since(f.told) < tellEvery
	if !quiet {
		f.told = time.Now()
	}
	f.mu.Unlock()
	if !quiet {
		log.G(f.svc.ctx).WithError(err).Warn(what)
	}
}

// carry carries one connection to its end.
func (f *forwarder) carry(conn *net.TCPConn) {
	// The buffers are given back.
	defer f.svc.quiet()
	defer context.AfterFunc(f.ctx, func() { relay.Reset(conn) })()
	port, err := dialledPort(conn)
	var guest relay.Conn
	if err == nil {
		guest, err = f.dial(port)
	}
	if err != nil {
		relay.Reset(conn)
		if errors.Is(err, errRefused) || f.ctx.Err() != nil {
			log.G(f.ctx).WithError(err).WithField("port", port).Debug("a port-forward was reset")
		} else {
			f.tell(fmt.Errorf("port %d: %w", port, err), "a port-forward was reset")
		}
		return
	}
	if err := relay.Run(conn, guest); err != nil {
		log.G(f.ctx).WithError(err).WithField("port", port).Debug("a port-forward was reset")
	}
}

// dial connects to a port of the pod's localhost.
func (f *forwarder) dial(port uint16) (_ relay.Conn, retErr error) {
	ctx, cancel := context.WithTimeout(f.ctx, carryLimit)
	defer cancel()
	select {
	case f.dials <- struct{}{}:
		defer func() { <-f.dials }()
	case <-ctx.Done():
		return nil, fmt.Errorf("%d port-forwards wait for the guest: %w", maxForwardDials, ctx.Err())
	}
	conn, err := f.svc.guest.transport.Dial(ctx, api.PortForward)
	if err != nil {
		return nil, fmt.Errorf("connect to the guest: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer func() {
		if !stop() && retErr == nil {
			retErr = fmt.Errorf("connect to the guest: %w", ctx.Err())
		}
		if retErr != nil {
			relay.Reset(conn)
		}
	}()
	if _, err := conn.Write(binary.BigEndian.AppendUint16(nil, port)); err != nil {
		return nil, fmt.Errorf("ask the guest: %w", err)
	}
	var answer [1]byte
	if _, err := io.ReadFull(conn, answer[:]); err != nil {
		return nil, fmt.Errorf("wait for the guest's answer: %w", err)
	}
	switch answer[0] {
	case api.ForwardAccepted:
	case api.ForwardRefused:
		return nil, errRefused
	case api.ForwardBusy:
		return nil, fmt.Errorf("the guest has too many connections: %w", errdefs.ErrResourceExhausted)
	case api.ForwardFailed:
		return nil, fmt.Errorf("the guest cannot connect, for a reason that its console tells: %w", errdefs.ErrUnavailable)
	default:
		return nil, fmt.Errorf("the guest answered %q to a port-forward: %w", answer[0], errdefs.ErrInternal)
	}
	guest, ok := conn.(relay.Conn)
	if !ok {
		return nil, fmt.Errorf("a %T has no ends of its own for both directions: %w", conn, errdefs.ErrInternal)
	}
	return guest, nil
}

// dialledPort is the port that a redirected connection was made to.
func dialledPort(conn *net.TCPConn) (uint16, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("find the port that was dialled: %w", err)
	}
	var port uint16
	var perr error
	if err := raw.Control(func(fd uintptr) { port, perr = originalPort(int(fd)) }); err != nil {
		perr = err
	}
	if perr != nil {
		return 0, fmt.Errorf("find the port that was dialled, of a connection that was not redirected: %w", perr)
	}
	return port, nil
}

// soOriginalDst is the kernel's SO_ORIGINAL_DST and IP6T_SO_ORIGINAL_DST.
const soOriginalDst = 80

// originalPort asks the kernel, which answers a sockaddr, for which x/sys has
// no call of its own: the types used here are of the right size, or larger.
func originalPort(fd int) (uint16, error) {
	addr, err := unix.Getsockname(fd)
	if err != nil {
		return 0, err
	}
	if _, ok := addr.(*unix.SockaddrInet4); ok {
		dst, err := unix.GetsockoptIPv6Mreq(fd, unix.IPPROTO_IP, soOriginalDst)
		if err != nil {
			return 0, err
		}
		return binary.BigEndian.Uint16(dst.Multiaddr[2:]), nil
	}
	dst, err := unix.GetsockoptIPv6MTUInfo(fd, unix.IPPROTO_IPV6, soOriginalDst)
	if err != nil {
		return 0, err
	}
	// In network order.
	return binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, dst.Addr.Port)), nil
}
