// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"context"
	"io"
	"math"
	"net"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cloudhv/containerd-cloudhv/guest/api"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// late is how long a guest of that mode takes over each answer.
const late = 3 * time.Second

// guest answers as an agent would, but for what its mode says.
type guest struct {
	mode string
	// on is closed when the first container has been started.
	on   chan struct{}
	once sync.Once

	mu      sync.Mutex
	streams map[string]net.Conn
	procs   map[string]*process
	pid     uint32
}

type process struct {
	pid            uint32
	stdout, stderr net.Conn
	ended          chan struct{}
	once           sync.Once
	status         uint32
}

func (p *process) end(status uint32) {
	p.once.Do(func() {
		p.status = status
		for _, c := range []net.Conn{p.stdout, p.stderr} {
			if c != nil {
				_ = c.Close()
			}
		}
		close(p.ended)
	})
}

func newGuest(mode string) *guest {
	return &guest{mode: mode, on: make(chan struct{}), streams: map[string]net.Conn{}, procs: map[string]*process{}, pid: 100}
}

// active tells whether the guest has begun to misbehave.
func (g *guest) active() bool {
	select {
	case <-g.on:
		return true
	default:
		return false
	}
}

// begin has the guest misbehave from now on.
func (g *guest) begin() {
	g.once.Do(func() {
		close(g.on)
		switch g.mode {
		case "spin":
			go spin()
		case "console":
			go console()
		}
	})
}

// stream takes a stream, as the protocol wants it.
func (g *guest) stream(conn net.Conn) {
	var header [api.StreamIDBytes + 1]byte
	if _, err := io.ReadFull(conn, header[:]); err != nil {
		_ = conn.Close()
		return
	}
	g.mu.Lock()
	g.streams[string(header[:api.StreamIDBytes])] = conn
	g.mu.Unlock()
	_, _ = conn.Write([]byte{api.StreamAccepted})
}

func (g *guest) take(id string) net.Conn {
	g.mu.Lock()
	defer g.mu.Unlock()
	c := g.streams[id]
	delete(g.streams, id)
	return c
}

// forward accepts a connection and sends without end.
func (g *guest) forward(conn net.Conn) {
	var port [api.ForwardRequestBytes]byte
	if _, err := io.ReadFull(conn, port[:]); err != nil {
		_ = conn.Close()
		return
	}
	if _, err := conn.Write([]byte{api.ForwardAccepted}); err == nil {
		flood(conn)
	}
}

func (g *guest) add(id, execID string, stdio *guestv1.Stdio) *process {
	stdout, stderr := g.take(stdio.GetStdout()), g.take(stdio.GetStderr())
	_ = g.take(stdio.GetStdin())
	g.mu.Lock()
	defer g.mu.Unlock()
	g.pid++
	p := &process{pid: g.pid, stdout: stdout, stderr: stderr, ended: make(chan struct{})}
	g.procs[id+"/"+execID] = p
	return p
}

func (g *guest) find(id, execID string) (*process, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if p := g.procs[id+"/"+execID]; p != nil {
		return p, nil
	}
	return nil, status.Error(codes.NotFound, "no such process")
}

// hold does not return, in the mode that never answers, and late in another.
func (g *guest) hold() {
	switch {
	case !g.active():
	case g.mode == "silent":
		select {}
	case g.mode == "late":
		time.Sleep(late)
	}
}

func (g *guest) Info(context.Context, *guestv1.InfoRequest) (*guestv1.InfoResponse, error) {
	return &guestv1.InfoResponse{
		AgentVersion: "hostile\x1b[2J\n" + strings.Repeat("v", 4096), KernelRelease: "\x00\u202e", ApiVersion: api.Version,
		VcpusOnline: math.MaxUint32, MemoryTotalBytes: math.MaxUint64, BootUsec: math.MaxUint64, AgentStartUsec: math.MaxUint64,
	}, nil
}

// manySteps are more, and longer, than anybody takes.
func manySteps() []*guestv1.Step {
	steps := make([]*guestv1.Step, 200)
	for i := range steps {
		steps[i] = &guestv1.Step{Name: "\x1b]0;" + strings.Repeat("n", 200), Usec: math.MaxUint64}
	}
	return steps
}

func (g *guest) Configure(context.Context, *guestv1.ConfigureRequest) (*guestv1.ConfigureResponse, error) {
	return &guestv1.ConfigureResponse{Steps: manySteps()}, nil
}

func (g *guest) Rehearse(context.Context, *guestv1.ConfigureRequest) (*guestv1.ConfigureResponse, error) {
	return &guestv1.ConfigureResponse{}, nil
}

func (g *guest) SyncClock(context.Context, *guestv1.SyncClockRequest) (*guestv1.SyncClockResponse, error) {
	return &guestv1.SyncClockResponse{Clock: timestamppb.New(time.Unix(1<<37, 0))}, nil
}

func (g *guest) Resize(context.Context, *guestv1.ResizeRequest) (*guestv1.ResizeResponse, error) {
	return &guestv1.ResizeResponse{VcpusOnline: math.MaxUint32, MemoryTotalBytes: math.MaxUint64}, nil
}

func (g *guest) PowerOff(context.Context, *guestv1.PowerOffRequest) (*emptypb.Empty, error) {
	g.hold()
	time.AfterFunc(500*time.Millisecond, func() { _ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF) })
	return &emptypb.Empty{}, nil
}

func (g *guest) WarmUp(context.Context, *guestv1.WarmUpRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}
