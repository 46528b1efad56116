// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"net"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/protobuf/types/known/emptypb"

	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// fakeAgent says how a guest answers.
type fakeAgent struct {
	info, configure, resize error
	version                 uint32
	// raw is sent in answer to whatever arrives.
	raw []byte
	// silent calls never answer.
	silentInfo, silentConfigure, silentPowerOff bool
	// lingers is a guest that answers PowerOff and then takes its time.
	lingers bool
	// slowConfigure delays the answer.
	slowConfigure time.Duration
	// noSteps leaves the steps out of the answer.
	noSteps bool
}

type machineService struct {
	m *fakeMachine
}

// taskService knows the warm-up alone.
type taskService struct {
	guestv1.TaskService
	m *fakeMachine
}

func (s *taskService) WarmUp(_ context.Context, req *guestv1.WarmUpRequest) (*emptypb.Empty, error) {
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	s.m.warmed = append(s.m.warmed, req)
	return &emptypb.Empty{}, nil
}

func (s *machineService) Rehearse(_ context.Context, req *guestv1.ConfigureRequest) (*guestv1.ConfigureResponse, error) {
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	s.m.rehearsed = append(s.m.rehearsed, req)
	return &guestv1.ConfigureResponse{}, nil
}

// silence waits until the machine has ended.
func (s *machineService) silence() error {
	<-s.m.done
	return errgrpc.ToGRPC(errdefs.ErrUnavailable)
}

func (s *machineService) Info(context.Context, *guestv1.InfoRequest) (*guestv1.InfoResponse, error) {
	if s.m.agent.silentInfo {
		return nil, s.silence()
	}
	return &guestv1.InfoResponse{
		AgentVersion: "test\x1b[31m", KernelRelease: "6.12", ApiVersion: s.m.agent.version, AgentStartUsec: 10, BootUsec: 30,
	}, errgrpc.ToGRPC(s.m.agent.info)
}

func (s *machineService) Configure(_ context.Context, req *guestv1.ConfigureRequest) (*guestv1.ConfigureResponse, error) {
	if s.m.agent.silentConfigure {
		return nil, s.silence()
	}
	time.Sleep(s.m.agent.slowConfigure)
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	s.m.configured = req
	if s.m.agent.noSteps {
		return &guestv1.ConfigureResponse{}, errgrpc.ToGRPC(s.m.agent.configure)
	}
	return &guestv1.ConfigureResponse{Steps: []*guestv1.Step{{Name: "clock", Usec: 5}, {Name: "network", Usec: 1 << 60}}}, errgrpc.ToGRPC(s.m.agent.configure)
}

func (s *machineService) Resize(_ context.Context, req *guestv1.ResizeRequest) (*guestv1.ResizeResponse, error) {
	s.m.mu.Lock()
	defer s.m.mu.Unlock()
	s.m.resized = append(s.m.resized, req)
	return &guestv1.ResizeResponse{}, errgrpc.ToGRPC(s.m.agent.resize)
}

func (s *machineService) PowerOff(context.Context, *guestv1.PowerOffRequest) (*emptypb.Empty, error) {
	if s.m.agent.silentPowerOff {
		return nil, s.silence()
	}
	if s.m.agent.lingers {
		return &emptypb.Empty{}, nil
	}
	s.m.die("guest powered off", true)
	return &emptypb.Empty{}, nil
}

// oneListener gives the connections that were put into it.
type oneListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (l *oneListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *oneListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *oneListener) Addr() net.Addr { return &net.UnixAddr{} }

// notifyConn tells when reading fails, as it does when the other end closes.
type notifyConn struct {
	net.Conn
	closed chan struct{}
	once   sync.Once
}

func (c *notifyConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err != nil {
		c.once.Do(func() { close(c.closed) })
	}
	return n, err
}
