// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	_ "github.com/containerd/containerd/api/events" // registers the events' types
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	eventsapi "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/fifo"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	hostv1 "github.com/cloudhv/containerd-cloudhv/controller/hostapi/v1"
)

const sandboxPid = 4_000_001

// fakeDaemon is containerd's ttrpc socket, which can go away and come back.
type fakeDaemon struct {
	t    testing.TB
	path string

	mu       sync.Mutex
	server   *ttrpc.Server
	listener *daemonListener
	served   chan struct{}
	topics   []string
	events   []any
	attached []string
	reports  []*hostv1.ReportRequest
	traces   map[string]string // of calls, by name
	attach   func(context.Context) error
	resizes  []*hostv1.ResizeRequest
	resize   func(*hostv1.ResizeRequest) error
	usages   []*hostv1.UsageRequest
	disks    []any // requests to attach and to detach, in order
	onDisks  func(any) error
}

func newFakeDaemon(t testing.TB, dir string) *fakeDaemon {
	d := &fakeDaemon{t: t, path: filepath.Join(dir, "c.sock")}
	d.start()
	t.Cleanup(d.stop)
	return d
}

func (d *fakeDaemon) start() {
	d.mu.Lock()
	defer d.mu.Unlock()
	_ = os.Remove(d.path)
	socket, err := net.Listen("unix", d.path)
	require.NoError(d.t, err)
	l := &daemonListener{Listener: socket}
	server, err := ttrpc.NewServer()
	require.NoError(d.t, err)
	eventsapi.RegisterTTRPCEventsService(server, d)
	hostv1.RegisterHostService(server, d)
	d.server, d.listener, d.served = server, l, make(chan struct{})
	served := d.served
	go func() {
		defer close(served)
		_ = server.Serve(context.Background(), l)
	}()
}

// stop answers what has been asked, and ends. Nothing is heard when it has returned.
func (d *fakeDaemon) stop() {
	d.mu.Lock()
	server, l, served := d.server, d.listener, d.served
	d.server = nil
	d.mu.Unlock()
	if server == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = server.Shutdown(ctx)
	_ = server.Close()
	<-served
	l.hangUp()
}

// daemonListener knows its connections: a ttrpc server closes them some time after
// it has returned from Close, and serves them till then.
type daemonListener struct {
	net.Listener
	mu    sync.Mutex
	conns []net.Conn
}

func (l *daemonListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns = append(l.conns, conn)
	return conn, nil
}

func (l *daemonListener) hangUp() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, conn := range l.conns {
		_ = conn.Close()
	}
}

func (d *fakeDaemon) Forward(ctx context.Context, r *eventsapi.ForwardRequest) (*emptypb.Empty, error) {
	ev, err := typeurl.UnmarshalAny(r.Envelope.Event)
	if err != nil {
		return nil, err
	}
	md, _ := ttrpc.GetMetadata(ctx)
	ns, _ := md.Get("containerd-namespace-ttrpc")
	d.mu.Lock()
	defer d.mu.Unlock()
	assert.Equal(d.t, []string{"k8s.io"}, ns)
	assert.Equal(d.t, "k8s.io", r.Envelope.Namespace)
	d.topics = append(d.topics, r.Envelope.Topic)
	d.events = append(d.events, ev)
	return &emptypb.Empty{}, nil
}

func (d *fakeDaemon) Report(ctx context.Context, r *hostv1.ReportRequest) (*emptypb.Empty, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.noteTrace(ctx, "Report "+r.Call)
	d.reports = append(d.reports, r)
	return &emptypb.Empty{}, nil
}

func (d *fakeDaemon) Usage(_ context.Context, r *hostv1.UsageRequest) (*emptypb.Empty, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.usages = append(d.usages, r)
	return &emptypb.Empty{}, nil
}

func (d *fakeDaemon) AttachDisks(_ context.Context, r *hostv1.AttachDisksRequest) (*hostv1.AttachDisksResponse, error) {
	if err := d.noteDisks(r); err != nil {
		return nil, err
	}
	resp := &hostv1.AttachDisksResponse{}
	for i := range r.Disks {
		resp.Serials = append(resp.Serials, fmt.Sprintf("%s-%d", r.ContainerId, i))
	}
	return resp, nil
}

func (d *fakeDaemon) DetachDisks(_ context.Context, r *hostv1.DetachDisksRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, d.noteDisks(r)
}

func (d *fakeDaemon) noteDisks(r any) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.disks = append(d.disks, r)
	if d.onDisks == nil {
		return nil
	}
	return errgrpc.ToGRPC(d.onDisks(r))
}

func (d *fakeDaemon) Resize(_ context.Context, r *hostv1.ResizeRequest) (*emptypb.Empty, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.resizes = append(d.resizes, r)
	if d.resize != nil {
		if err := d.resize(r); err != nil {
			return nil, errgrpc.ToGRPC(err)
		}
	}
	return &emptypb.Empty{}, nil
}

// noteTrace keeps the trace that a call is part of, under d.mu.
func (d *fakeDaemon) noteTrace(ctx context.Context, call string) {
	if d.traces == nil {
		d.traces = map[string]string{}
	}
	md, _ := ttrpc.GetMetadata(ctx)
	v, _ := md.Get("traceparent")
	d.traces[call] = strings.Join(v, " ")
}

func (d *fakeDaemon) AttachRootFS(ctx context.Context, r *hostv1.AttachRootFSRequest) (*hostv1.AttachRootFSResponse, error) {
	d.mu.Lock()
	d.noteTrace(ctx, "AttachRootFS")
	attach := d.attach
	d.attached = append(d.attached, r.SandboxId+"/"+r.ContainerId)
	d.mu.Unlock()
	if attach != nil {
		if err := attach(ctx); err != nil {
			return nil, errgrpc.ToGRPC(err)
		}
	}
	return &hostv1.AttachRootFSResponse{ImageSerial: "0123456789abcdef0123"}, nil
}

// wait returns the topics when there are n of them.
func (d *fakeDaemon) wait(n int) []string {
	d.t.Helper()
	var out []string
	eventually(d.t, "events", func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		out = append([]string(nil), d.topics...)
		return len(out) >= n
	})
	return out
}

// pod is a shim that serves, with all around it.
type pod struct {
	t      testing.TB
	dir    string
	guest  *fakeGuest
	daemon *fakeDaemon
	client taskapi.TTRPCTaskService
	svc    *service
}

func newPod(t testing.TB) *pod {
	t.Helper()
	dir, err := os.MkdirTemp("", "shim")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	p := &pod{t: t, dir: dir, guest: newFakeGuest(t), daemon: newFakeDaemon(t, dir)}
	cfg := Config{SandboxID: "sb", Namespace: "k8s.io", SandboxPid: sandboxPid, GuestEndpoint: "fake", TTRPCAddress: p.daemon.path}
	p.svc = newService(context.Background(), cfg, dir, p.guest)
	server, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(p.svc.intercept))
	require.NoError(t, err)
	p.svc.register(server)
	l, err := net.Listen("unix", filepath.Join(dir, SocketFile))
	require.NoError(t, err)
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve(context.Background(), l)
	}()
	conn, err := net.Dial("unix", filepath.Join(dir, SocketFile))
	require.NoError(t, err)
	client := ttrpc.NewClient(conn)
	p.client = taskapi.NewTTRPCTaskClient(client)
	t.Cleanup(func() {
		_ = client.Close()
		_ = server.Close()
		<-served
		p.svc.close(0)
	})
	return p
}

// ctx ends with a test that hangs.
func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// stdio are FIFOs as containerd makes and opens them.
type stdio struct {
	in       io.WriteCloser
	out, err io.ReadCloser
	paths    [3]string
}

func (p *pod) stdio(name string, stdin bool) *stdio {
	p.t.Helper()
	s := &stdio{}
	dir := filepath.Join(p.dir, "io")
	require.NoError(p.t, os.MkdirAll(dir, 0o700))
	for i, suffix := range []string{"stdin", "stdout", "stderr"} {
		s.paths[i] = filepath.Join(dir, name+"-"+suffix)
	}
	if !stdin {
		s.paths[0] = ""
	} else {
		s.in = p.fifo(s.paths[0], syscall.O_WRONLY)
	}
	s.out = p.fifo(s.paths[1], syscall.O_RDONLY)
	s.err = p.fifo(s.paths[2], syscall.O_RDONLY)
	return s
}

func (p *pod) fifo(path string, mode int) io.ReadWriteCloser {
	p.t.Helper()
	f, err := fifo.OpenFifo(context.Background(), path, mode|syscall.O_CREAT|syscall.O_NONBLOCK, 0o700)
	require.NoError(p.t, err)
	p.t.Cleanup(func() { _ = f.Close() })
	return f
}

// bundle writes a bundle with a spec that CRI could have written.
func (p *pod) bundle(id string, change func(*specs.Spec), args ...string) string {
	p.t.Helper()
	dir := filepath.Join(p.dir, "bundle-"+id)
	require.NoError(p.t, os.MkdirAll(dir, 0o700))
	spec := criSpec(p.t, args...)
	if change != nil {
		change(spec)
	}
	data, err := json.Marshal(spec)
	require.NoError(p.t, err)
	require.NoError(p.t, os.WriteFile(filepath.Join(dir, "config.json"), data, 0o600))
	return dir
}

func (p *pod) createRequest(id string, s *stdio, args ...string) *taskapi.CreateTaskRequest {
	r := &taskapi.CreateTaskRequest{ID: id, Bundle: p.bundle(id, nil, args...)}
	if s != nil {
		r.Stdin, r.Stdout, r.Stderr = s.paths[0], s.paths[1], s.paths[2]
	}
	return r
}

// create makes a container.
func (p *pod) create(id string, s *stdio, args ...string) {
	p.t.Helper()
	_, err := p.client.Create(testContext(p.t), p.createRequest(id, s, args...))
	require.NoError(p.t, err)
}

// run makes and starts a container.
func (p *pod) run(id string, s *stdio, args ...string) {
	p.t.Helper()
	p.create(id, s, args...)
	_, err := p.client.Start(testContext(p.t), &taskapi.StartRequest{ID: id})
	require.NoError(p.t, err)
}

func (p *pod) exec(id, execID string, s *stdio, args ...string) {
	p.t.Helper()
	data, err := json.Marshal(&specs.Process{Args: args, Cwd: "/"})
	require.NoError(p.t, err)
	r := &taskapi.ExecProcessRequest{ID: id, ExecID: execID, Spec: &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process", Value: data}}
	if s != nil {
		r.Stdin, r.Stdout, r.Stderr = s.paths[0], s.paths[1], s.paths[2]
	}
	_, err = p.client.Exec(testContext(p.t), r)
	require.NoError(p.t, err)
}

func (p *pod) wait(id, execID string) *taskapi.WaitResponse {
	p.t.Helper()
	resp, err := p.client.Wait(testContext(p.t), &taskapi.WaitRequest{ID: id, ExecID: execID})
	require.NoError(p.t, err)
	return resp
}

func (p *pod) delete(id, execID string) *taskapi.DeleteResponse {
	p.t.Helper()
	resp, err := p.client.Delete(testContext(p.t), &taskapi.DeleteRequest{ID: id, ExecID: execID})
	require.NoError(p.t, err)
	return resp
}

func (p *pod) state(id, execID string) *taskapi.StateResponse {
	p.t.Helper()
	resp, err := p.client.State(testContext(p.t), &taskapi.StateRequest{ID: id, ExecID: execID})
	require.NoError(p.t, err)
	return resp
}

func native(err error) error { return errgrpc.ToNative(err) }
