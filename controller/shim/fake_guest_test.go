// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cloudhv/containerd-cloudhv/guest/api"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// fakeGuest is a VM with an agent in this process: it serves the guest's API on
// socket pairs and runs Go functions as processes.
type fakeGuest struct {
	t      testing.TB
	server *ttrpc.Server
	rpc    *connListener
	done   chan struct{}
	once   sync.Once

	// before is called at the start of each call, with its name; an error fails it.
	before atomic.Pointer[func(ctx context.Context, call string) error]
	// forward serves port-forwards.
	forward atomic.Pointer[func(conn net.Conn, port uint16)]

	mu    sync.Mutex
	conns []net.Conn
	// forwards are those of port-forwards.
	forwards []net.Conn
	streams  map[string]net.Conn
	procs    map[string]*fakeProc
	nextPid  uint32
	created  []*guestv1.CreateRequest
	steps    []*guestv1.Step // that a create tells
	updated  [][]byte
	sizes    []string
}

// fakeProc is a process of a fakeGuest.
type fakeProc struct {
	args           []string
	stdin          net.Conn
	stdout, stderr net.Conn
	pid            uint32
	started        bool
	killed         chan uint32
	ended          chan struct{}
	resp           *guestv1.WaitResponse
}

func newFakeGuest(t testing.TB) *fakeGuest {
	g := &fakeGuest{
		t: t, rpc: newConnListener(), done: make(chan struct{}),
		streams: make(map[string]net.Conn), procs: make(map[string]*fakeProc), nextPid: 100,
	}
	server, err := ttrpc.NewServer()
	require.NoError(t, err)
	g.server = server
	guestv1.RegisterTaskService(server, g)
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve(context.Background(), g.rpc)
	}()
	t.Cleanup(func() {
		g.die()
		_ = server.Close()
		<-served
	})
	return g
}

var _ Guest = (*fakeGuest)(nil)

// die is the loss of the VM.
func (g *fakeGuest) die() {
	g.once.Do(func() {
		close(g.done)
		g.mu.Lock()
		defer g.mu.Unlock()
		for _, c := range g.conns {
			_ = c.Close()
		}
		for _, p := range g.procs {
			g.kill(p, 9)
		}
	})
}

func (g *fakeGuest) Done() <-chan struct{} { return g.done }

// Close ends port-forwards only: the tests look at what becomes of the rest.
func (g *fakeGuest) Close() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, c := range g.forwards {
		_ = c.Close()
	}
	return nil
}

func (g *fakeGuest) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	select {
	case <-g.done:
		return nil, fmt.Errorf("no VM: %w", errdefs.ErrUnavailable)
	default:
	}
	host, guest := connPair(g.t)
	g.mu.Lock()
	g.conns = append(g.conns, host, guest)
	if port == api.PortForward {
		g.forwards = append(g.forwards, host, guest)
	}
	g.mu.Unlock()
	switch port {
	case api.PortRPC:
		g.rpc.conns <- guest
	case api.PortStream:
		if err := g.call(ctx, "Stream"); err != nil {
			_ = host.Close()
			_ = guest.Close()
			return nil, err
		}
		go g.accept(guest)
	case api.PortForward:
		go func() {
			var port [api.ForwardRequestBytes]byte
			if _, err := io.ReadFull(guest, port[:]); err == nil {
				(*g.forward.Load())(guest, binary.BigEndian.Uint16(port[:]))
			}
		}()
	}
	return host, nil
}

func (g *fakeGuest) accept(conn net.Conn) {
	header := make([]byte, api.StreamIDBytes+1)
	if _, err := io.ReadFull(conn, header); err != nil {
		_ = conn.Close()
		return
	}
	g.mu.Lock()
	g.streams[string(header[:api.StreamIDBytes])] = conn
	g.mu.Unlock()
	_, _ = conn.Write([]byte{api.StreamAccepted})
}

func (g *fakeGuest) call(ctx context.Context, name string) error {
	if f := g.before.Load(); f != nil {
		return (*f)(ctx, name)
	}
	return nil
}

// intercept sets the function that is called before each call.
func (g *fakeGuest) intercept(f func(ctx context.Context, call string) error) { g.before.Store(&f) }

// failing makes one call fail, and fine undoes it.
func (g *fakeGuest) failing(name string, err error) {
	g.intercept(func(_ context.Context, call string) error {
		if call == name {
			return err
		}
		return nil
	})
}

func (g *fakeGuest) fine() { g.before.Store(nil) }

// holding makes calls wait until the VM ends or release is closed: that a call's
// time is up would be an answer too.
func (g *fakeGuest) holding(release <-chan struct{}, names ...string) {
	g.intercept(func(_ context.Context, call string) error {
		for _, n := range names {
			if n == call || n == "*" && call != "Wait" {
				select {
				case <-release:
				case <-g.done:
				}
			}
		}
		return nil
	})
}

func key(id, execID string) string { return id + "/" + execID }

func (g *fakeGuest) proc(id, execID string) (*fakeProc, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if p := g.procs[key(id, execID)]; p != nil {
		return p, nil
	}
	return nil, errgrpc.ToGRPC(fmt.Errorf("no process %s %s: %w", id, execID, errdefs.ErrNotFound))
}

func (g *fakeGuest) add(id, execID string, args []string, stdio *guestv1.Stdio) (*fakeProc, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.procs[key(id, execID)] != nil {
		return nil, errgrpc.ToGRPC(errdefs.ErrAlreadyExists)
	}
	g.nextPid++
	p := &fakeProc{args: args, pid: g.nextPid, killed: make(chan uint32, 16), ended: make(chan struct{})}
	for _, s := range []struct {
		id string
		to *net.Conn
	}{{stdio.Stdin, &p.stdin}, {stdio.Stdout, &p.stdout}, {stdio.Stderr, &p.stderr}} {
		if s.id == "" {
			continue
		}
		conn := g.streams[s.id]
		if conn == nil {
			return nil, errgrpc.ToGRPC(fmt.Errorf("stream %s: %w", s.id, errdefs.ErrNotFound))
		}
		delete(g.streams, s.id)
		*s.to = conn
	}
	g.procs[key(id, execID)] = p
	return p, nil
}

func (g *fakeGuest) Create(ctx context.Context, r *guestv1.CreateRequest) (*guestv1.CreateResponse, error) {
	if err := g.call(ctx, "Create"); err != nil {
		return nil, err
	}
	var spec specs.Spec
	if err := json.Unmarshal(r.Spec, &spec); err != nil {
		return nil, err
	}
	p, err := g.add(r.Id, "", spec.Process.Args, r.Stdio)
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	g.created = append(g.created, r)
	g.mu.Unlock()
	return &guestv1.CreateResponse{Pid: p.pid, Steps: g.steps}, nil
}

func (g *fakeGuest) Exec(ctx context.Context, r *guestv1.ExecRequest) (*emptypb.Empty, error) {
	if err := g.call(ctx, "Exec"); err != nil {
		return nil, err
	}
	var process specs.Process
	if err := json.Unmarshal(r.Process, &process); err != nil {
		return nil, err
	}
	_, err := g.add(r.Id, r.ExecId, process.Args, r.Stdio)
	return &emptypb.Empty{}, err
}

func (g *fakeGuest) Start(ctx context.Context, r *guestv1.StartRequest) (*guestv1.StartResponse, error) {
	p, err := g.proc(r.Id, r.ExecId)
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	p.started = true
	g.mu.Unlock()
	if err := g.call(ctx, "Start"); err != nil {
		return nil, err
	}
	go g.run(p)
	// With this the process has ended before its start is answered.
	if err := g.call(ctx, "Started"); err != nil {
		return nil, err
	}
	return &guestv1.StartResponse{Pid: p.pid}, nil
}

// run is the process: args[0] says what it does.
func (g *fakeGuest) run(p *fakeProc) {
	var status uint32
	switch p.args[0] {
	case "echo":
		_, _ = io.WriteString(p.stdout, p.args[1])
		if p.stderr != nil {
			_, _ = io.WriteString(p.stderr, "err:"+p.args[1])
		}
	case "cat":
		if _, err := io.Copy(p.stdout, p.stdin); err != nil {
			status = 1
		}
	case "bytes":
		n, _ := strconv.Atoi(p.args[1])
		if err := writePattern(p.stdout, n); err != nil {
			status = 1
		}
	case "exit":
		n, _ := strconv.Atoi(p.args[1])
		status = uint32(n)
	case "oom":
		g.end(p, &guestv1.WaitResponse{ExitStatus: 137, ExitedAt: timestamppb.Now(), OomKills: 2})
		return
	case "strange":
		g.end(p, &guestv1.WaitResponse{ExitStatus: 1 << 20, ExitedAt: &timestamppb.Timestamp{Seconds: 1 << 60, Nanos: -5}})
		return
	case "sleep":
		status = 128 + <-p.killed
	}
	g.end(p, &guestv1.WaitResponse{ExitStatus: status, ExitedAt: timestamppb.Now()})
}

func (g *fakeGuest) end(p *fakeProc, resp *guestv1.WaitResponse) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if p.resp != nil {
		return
	}
	p.resp = resp
	for _, c := range []net.Conn{p.stdin, p.stdout, p.stderr} {
		if c != nil {
			_ = c.Close()
		}
	}
	close(p.ended)
}

// kill is for who holds g.mu.
func (g *fakeGuest) kill(p *fakeProc, signal uint32) {
	select {
	case p.killed <- signal:
	default:
	}
	if p.started && p.args[0] == "sleep" {
		return
	}
	if p.resp == nil && signal == 9 {
		go g.end(p, &guestv1.WaitResponse{ExitStatus: 137, ExitedAt: timestamppb.Now()})
	}
}

func (g *fakeGuest) Delete(ctx context.Context, r *guestv1.DeleteRequest) (*guestv1.DeleteResponse, error) {
	if err := g.call(ctx, "Delete"); err != nil {
		return nil, err
	}
	p, err := g.proc(r.Id, r.ExecId)
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	running := p.started && p.resp == nil
	g.mu.Unlock()
	if running {
		return nil, errgrpc.ToGRPC(fmt.Errorf("it runs: %w", errdefs.ErrFailedPrecondition))
	}
	g.end(p, &guestv1.WaitResponse{ExitStatus: 137, ExitedAt: timestamppb.Now()})
	g.mu.Lock()
	delete(g.procs, key(r.Id, r.ExecId))
	g.mu.Unlock()
	return &guestv1.DeleteResponse{Pid: p.pid, ExitStatus: p.resp.ExitStatus, ExitedAt: p.resp.ExitedAt}, nil
}

func (g *fakeGuest) Kill(ctx context.Context, r *guestv1.KillRequest) (*emptypb.Empty, error) {
	if err := g.call(ctx, "Kill"); err != nil {
		return nil, err
	}
	p, err := g.proc(r.Id, r.ExecId)
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.kill(p, r.Signal)
	return &emptypb.Empty{}, nil
}

func (g *fakeGuest) Wait(ctx context.Context, r *guestv1.WaitRequest) (*guestv1.WaitResponse, error) {
	if err := g.call(ctx, "Wait"); err != nil {
		return nil, err
	}
	p, err := g.proc(r.Id, r.ExecId)
	if err != nil {
		return nil, err
	}
	select {
	case <-p.ended:
		return p.resp, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (g *fakeGuest) ResizePty(ctx context.Context, r *guestv1.ResizePtyRequest) (*emptypb.Empty, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.sizes = append(g.sizes, fmt.Sprintf("%s %dx%d", key(r.Id, r.ExecId), r.Width, r.Height))
	return &emptypb.Empty{}, nil
}

func (g *fakeGuest) Pause(ctx context.Context, _ *guestv1.PauseRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, g.call(ctx, "Pause")
}

func (g *fakeGuest) Resume(ctx context.Context, _ *guestv1.ResumeRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, g.call(ctx, "Resume")
}

func (g *fakeGuest) Update(ctx context.Context, r *guestv1.UpdateRequest) (*emptypb.Empty, error) {
	if err := g.call(ctx, "Update"); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.updated = append(g.updated, r.Resources)
	return &emptypb.Empty{}, nil
}

func (g *fakeGuest) Stats(ctx context.Context, r *guestv1.StatsRequest) (*guestv1.StatsResponse, error) {
	if err := g.call(ctx, "Stats"); err != nil {
		return nil, err
	}
	return &guestv1.StatsResponse{
		Cpu:    &guestv1.CPUStats{UsageUsec: 7},
		Memory: &guestv1.MemoryStats{Usage: 4096, UsageLimit: 8192, Stat: map[string]uint64{"anon": 1, "inactive_file": 2, "strange": 3}, OomKill: 0},
		Pids:   &guestv1.PidsStats{Current: 3},
		Io:     []*guestv1.IOStats{{Major: 254, Rbytes: 9}},

		WritableBytes: 123 << 10, WritableInodes: 45,
	}, nil
}

func (g *fakeGuest) Pids(context.Context, *guestv1.PidsRequest) (*guestv1.PidsResponse, error) {
	return nil, errgrpc.ToGRPC(errdefs.ErrNotImplemented)
}

func (g *fakeGuest) State(context.Context, *guestv1.StateRequest) (*guestv1.StateResponse, error) {
	return nil, errgrpc.ToGRPC(errdefs.ErrNotImplemented)
}

func (g *fakeGuest) WarmUp(context.Context, *guestv1.WarmUpRequest) (*emptypb.Empty, error) {
	return nil, errgrpc.ToGRPC(errdefs.ErrNotImplemented)
}

// MountVolumes reads nothing of what is served.
func (g *fakeGuest) MountVolumes(ctx context.Context, r *guestv1.MountVolumesRequest) (*emptypb.Empty, error) {
	g.mu.Lock()
	open := g.streams[r.Stream] != nil
	g.mu.Unlock()
	if !open {
		return nil, fmt.Errorf("stream %s: %w", r.Stream, errdefs.ErrNotFound)
	}
	return &emptypb.Empty{}, g.call(ctx, "MountVolumes")
}
