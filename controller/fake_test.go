// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/controller/config"
	"github.com/cloudhv/containerd-cloudhv/controller/network"
	"github.com/cloudhv/containerd-cloudhv/controller/rootfs"
	"github.com/cloudhv/containerd-cloudhv/guest/api"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// TestMain runs the tests or, when the controller starts this binary as a
// shim, waits for the signal to end.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "-sandbox" {
		end := make(chan os.Signal, 1)
		signal.Notify(end, unix.SIGTERM)
		<-end
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

var errInjected = fmt.Errorf("injected: %w", errdefs.ErrResourceExhausted)

// fakeDriver runs machines that are goroutines. They outlive a Controller, as
// processes outlive containerd.
type fakeDriver struct {
	mu       sync.Mutex
	machines map[int]*fakeMachine
	nextPid  int
	// bootErr, attachErr make these fail; agent is what new machines' guests do.
	bootErr, attachErr error
	agent              fakeAgent
	vm                 vmFaults
	boots              int
}

// vmFaults make a machine's methods fail.
type vmFaults struct {
	nic, resize, disk error
	// kill fails as often as it says.
	kill atomic.Int32
	// dieInBoot ends the machine when the guest is dialled first.
	dieInBoot bool
}

// fakeAgent says how a guest answers.
type fakeAgent struct {
	info, configure, resize error
	version                 uint32
	// silent calls never answer.
	silentInfo, silentConfigure, silentPowerOff bool
	// slowConfigure delays the answer.
	slowConfigure time.Duration
}

func newFakeDriver() *fakeDriver {
	return &fakeDriver{machines: map[int]*fakeMachine{}, nextPid: 1 << 30, agent: fakeAgent{version: api.Version}}
}

func (d *fakeDriver) Name() string { return "fake" }

func (d *fakeDriver) Probe(context.Context) (vmm.Host, error) {
	return vmm.Host{Driver: "fake", Version: "1", Accelerator: "none", Reason: "a test"}, nil
}

func (d *fakeDriver) Boot(_ context.Context, cfg vmm.Config) (vmm.VM, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.boots++
	if d.bootErr != nil {
		return nil, d.bootErr
	}
	if _, err := os.Stat(cfg.Scratch); err != nil {
		return nil, err
	}
	d.nextPid++
	m := &fakeMachine{
		driver: d, cfg: cfg, size: cfg.Size, pid: d.nextPid, agent: d.agent, done: make(chan struct{}), disks: map[string]int{},
	}
	d.machines[m.pid] = m
	return &fakeVM{fakeMachine: m}, nil
}

func (d *fakeDriver) Restore(context.Context, vmm.Config, vmm.Snapshot) (vmm.VM, error) {
	return nil, errdefs.ErrNotImplemented
}

func (d *fakeDriver) Attach(_ context.Context, s vmm.State) (vmm.VM, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.attachErr != nil {
		return nil, d.attachErr
	}
	m, ok := d.machines[s.Pid]
	if !ok {
		return nil, fmt.Errorf("pid %d: %w", s.Pid, errdefs.ErrNotFound)
	}
	return &fakeVM{fakeMachine: m}, nil
}

func (d *fakeDriver) running() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.machines)
}

// only is the one machine that runs.
func (d *fakeDriver) only(t *testing.T) *fakeMachine {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	require.Len(t, d.machines, 1)
	for _, m := range d.machines {
		return m
	}
	return nil
}

type fakeMachine struct {
	driver *fakeDriver
	cfg    vmm.Config
	pid    int
	agent  fakeAgent
	done   chan struct{}

	mu         sync.Mutex
	size       vmm.Size
	nics       []string
	disks      map[string]int
	configured *guestv1.ConfigureRequest
	resized    []*guestv1.ResizeRequest
	exit       vmm.Exit
}

// die ends the machine.
func (m *fakeMachine) die(cause string, requested bool) {
	m.driver.mu.Lock()
	delete(m.driver.machines, m.pid)
	m.driver.mu.Unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	if !isClosed(m.done) {
		m.exit = vmm.Exit{At: time.Now(), Cause: cause, Requested: requested}
		close(m.done)
	}
}

// fakeVM is one process's handle of a machine.
type fakeVM struct {
	*fakeMachine
}

func (v *fakeVM) ID() string { return v.cfg.ID }

func (v *fakeVM) State() vmm.State {
	return vmm.State{Driver: "fake", ID: v.cfg.ID, Dir: v.cfg.Dir, Pid: v.pid, BootID: "boot", Cgroup: v.cfg.CgroupPath}
}

func (v *fakeVM) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	if v.driver.vm.dieInBoot {
		v.die("triple fault", false)
	}
	if isClosed(v.done) || port != api.PortRPC {
		return nil, fmt.Errorf("dial: %w", errdefs.ErrUnavailable)
	}
	host, guest := net.Pipe()
	go v.serve(guest)
	return host, nil
}

// serve answers on one connection until its other end is closed.
func (v *fakeVM) serve(conn net.Conn) {
	srv, err := ttrpc.NewServer()
	if err != nil {
		panic(err)
	}
	guestv1.RegisterMachineService(srv, &machineService{v.fakeMachine})
	l := &oneListener{conns: make(chan net.Conn, 1), closed: make(chan struct{})}
	closed := make(chan struct{})
	l.conns <- &notifyConn{Conn: conn, closed: closed}
	go func() {
		select {
		case <-closed:
		case <-v.done:
		}
		_ = srv.Close()
		_ = conn.Close()
	}()
	_ = srv.Serve(context.Background(), l)
}

func (v *fakeVM) PodEndpoint() string { return "serial+unix://" + filepath.Join(v.cfg.Dir, "pod.sock") }

func (v *fakeVM) AddDisk(_ context.Context, disk vmm.Disk) error {
	if err := v.alive(); err != nil {
		return err
	}
	if err := v.driver.vm.disk; err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.disks[disk.Serial] > 0 {
		return fmt.Errorf("disk %s: %w", disk.Serial, errdefs.ErrAlreadyExists)
	}
	v.disks[disk.Serial]++
	return nil
}

func (v *fakeVM) RemoveDisk(_ context.Context, serial string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.disks, serial)
	return nil
}

func (v *fakeVM) AddNIC(_ context.Context, nic vmm.NIC) error {
	if err := v.alive(); err != nil {
		return err
	}
	if err := v.driver.vm.nic; err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.nics = append(v.nics, nic.ID)
	return nil
}

func (v *fakeVM) RemoveNIC(context.Context, string) error { return nil }

func (v *fakeVM) Resize(_ context.Context, size vmm.Size) error {
	if err := v.alive(); err != nil {
		return err
	}
	if err := v.driver.vm.resize; err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.size = size
	return nil
}

func (v *fakeVM) alive() error {
	if isClosed(v.done) {
		return errdefs.ErrUnavailable
	}
	return nil
}

func (v *fakeVM) Pause(context.Context) error  { return nil }
func (v *fakeVM) Resume(context.Context) error { return nil }

func (v *fakeVM) Snapshot(context.Context, string) (vmm.Snapshot, error) {
	return vmm.Snapshot{}, errdefs.ErrNotImplemented
}

func (v *fakeVM) Kill(context.Context) error {
	if v.driver.vm.kill.Add(-1) >= 0 {
		return errInjected
	}
	v.die("killed", true)
	return nil
}

func (v *fakeVM) Close() error          { return nil }
func (v *fakeVM) Done() <-chan struct{} { return v.done }
func (v *fakeVM) Exit() vmm.Exit        { return v.exit }

type machineService struct {
	m *fakeMachine
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

// fakeNetwork counts what is connected.
type fakeNetwork struct {
	mu        sync.Mutex
	connected map[string]int
	err       error
	// disconnectErr fails as often as it says.
	disconnectErr int
}

func (f *fakeNetwork) Connect(_ context.Context, ns string) (*network.Network, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return nil, f.err
	}
	f.connected[ns]++
	return &network.Network{
		NICs:       []vmm.NIC{{ID: "nic0", MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, MTU: 1500}},
		Interfaces: []*guestv1.Interface{{Name: "eth0"}},
	}, nil
}

func (f *fakeNetwork) Disconnect(_ context.Context, ns string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.disconnectErr > 0 {
		f.disconnectErr--
		return errInjected
	}
	delete(f.connected, ns)
	return nil
}

func (f *fakeNetwork) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.connected)
}

// fakeImages is an image store without images.
type fakeImages struct {
	mu   sync.Mutex
	pins map[string]int
	err  error
}

func (f *fakeImages) Get(_ context.Context, src rootfs.Source) (*rootfs.Image, error) {
	if f.err != nil {
		return nil, f.err
	}
	return f.Pin("image-of-" + src.Key), nil
}

func (f *fakeImages) Pin(key string) *rootfs.Image {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pins[key]++
	return rootfs.NewImage(key, "/images/"+key, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.pins[key]--; f.pins[key] == 0 {
			delete(f.pins, key)
		}
	})
}

// fakeSandboxes is containerd's sandbox store.
type fakeSandboxes struct {
	sandbox.Store
	mu    sync.Mutex
	known map[string]bool
	err   error
}

func (f *fakeSandboxes) Get(ctx context.Context, id string) (sandbox.Sandbox, error) {
	if ns, _ := namespaces.Namespace(ctx); ns != testNamespace {
		return sandbox.Sandbox{}, errors.New("wrong namespace")
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return sandbox.Sandbox{}, f.err
	}
	if !f.known[id] {
		return sandbox.Sandbox{}, errdefs.ErrNotFound
	}
	return sandbox.Sandbox{ID: id}, nil
}

// fakeContainers is containerd's container store.
type fakeContainers struct {
	containers.Store
	sandbox map[string]string
}

func (f *fakeContainers) Get(_ context.Context, id string) (containers.Container, error) {
	sb, ok := f.sandbox[id]
	if !ok {
		return containers.Container{}, errdefs.ErrNotFound
	}
	return containers.Container{ID: id, SandboxID: sb, Snapshotter: "overlayfs", SnapshotKey: id[:1]}, nil
}

const testNamespace = "k8s.io"

// node is a host for Controllers, which come and go as containerd does.
type node struct {
	t          *testing.T
	cfg        *config.Settings
	driver     *fakeDriver
	net        *fakeNetwork
	images     *fakeImages
	sandboxes  *fakeSandboxes
	containers *fakeContainers
	*Controller
}

func newNode(t *testing.T) *node {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	state, err := os.MkdirTemp("", "chv")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(state)) })
	n := &node{
		t: t,
		cfg: &config.Settings{
			VMM: "fake", Kernel: "/k", Image: "/i", Shim: self,
			DefaultVCPUs: 1, MaxVCPUs: 4, DefaultMemory: 256 << 20, MaxMemory: 2 << 30, BaseMemory: 128 << 20, MemoryOverhead: 64 << 20,
			StateDir: state, CacheDir: t.TempDir(), ScratchSize: 64 << 20, ConsoleLogLimit: 1 << 20,
			Annotations:       []string{"io.cloudhv.*", "io.katacontainers.config.hypervisor.*"},
			UnprivilegedPorts: true, UnprivilegedICMP: true,
			BootTimeout: 10 * time.Second, AgentTimeout: 10 * time.Second, HotPlugTimeout: 10 * time.Second,
			PowerOffTimeout: 10 * time.Second, CleanupTimeout: 10 * time.Second, RootFSTimeout: 10 * time.Second,
			RecoverTimeout: 10 * time.Second,
		},
		driver:     newFakeDriver(),
		net:        &fakeNetwork{connected: map[string]int{}},
		images:     &fakeImages{pins: map[string]int{}},
		sandboxes:  &fakeSandboxes{known: map[string]bool{}},
		containers: &fakeContainers{sandbox: map[string]string{}},
	}
	n.Controller = n.controller()
	t.Cleanup(n.end)
	return n
}

func (n *node) controller() *Controller {
	host, _ := n.driver.Probe(n.t.Context())
	return New(Options{
		Settings: n.cfg, Drivers: []vmm.Driver{n.driver}, Driver: n.driver, Host: host,
		Sandboxes: n.sandboxes, Containers: n.containers, Images: n.images, Network: n.net, TTRPCAddress: "/run/x.ttrpc",
	})
}

// restart makes a new Controller of what the old one left, as a new containerd
// does. What happens during its absence is not seen by the old one's watchers.
func (n *node) restart(during ...func(*node)) {
	n.t.Helper()
	old := n.Controller
	old.mu.Lock()
	pods := old.pods
	old.pods = map[string]*pod{}
	old.mu.Unlock()
	for _, p := range pods {
		p.markExited() // its watcher ends
		p.mu.Lock()
		if p.shim != nil && !isClosed(p.shim.done()) {
			p.shim.handle.Close()
		}
		p.mu.Unlock()
	}
	for _, f := range during {
		time.Sleep(50 * time.Millisecond) // for the watchers to be gone
		f(n)
	}
	n.images.mu.Lock()
	n.images.pins = map[string]int{}
	n.images.mu.Unlock()
	n.Controller = n.controller()
	require.NoError(n.t, n.Recover(n.t.Context()))
}

// end removes all sandboxes.
func (n *node) end() {
	for _, p := range n.all() {
		_ = n.Shutdown(n.ctx(), p.id)
	}
}

func (n *node) all() []*pod {
	n.mu.Lock()
	defer n.mu.Unlock()
	var all []*pod
	for _, p := range n.pods {
		all = append(all, p)
	}
	return all
}

func (n *node) ctx() context.Context {
	return namespaces.WithNamespace(context.Background(), testNamespace)
}

// create creates a sandbox as CRI does.
func (n *node) create(id string) error {
	n.sandboxes.mu.Lock()
	n.sandboxes.known[id] = true
	n.sandboxes.mu.Unlock()
	return n.Create(n.ctx(), sandbox.Sandbox{ID: id}, sandbox.WithNetNSPath("/netns/"+id),
		sandbox.WithOptions(&runtime.PodSandboxConfig{Hostname: "host-of-" + id}))
}

// run creates and starts a sandbox.
func (n *node) run(id string) *pod {
	n.t.Helper()
	require.NoError(n.t, n.create(id))
	_, err := n.Start(n.ctx(), id)
	require.NoError(n.t, err)
	p, err := n.get(id)
	require.NoError(n.t, err)
	return p
}

// requireNothing checks that no sandbox has anything on the host.
func (n *node) requireNothing() {
	n.t.Helper()
	require.Empty(n.t, n.all())
	require.Zero(n.t, n.driver.running(), "machines")
	require.Zero(n.t, n.net.count(), "networks")
	require.Empty(n.t, n.images.pins, "pins")
	entries, err := os.ReadDir(n.cfg.StateDir)
	require.NoError(n.t, err)
	for _, e := range entries {
		require.Equal(n.t, damagedDir, e.Name(), "state directory")
	}
	scratch, _ := filepath.Glob(filepath.Join(n.cfg.CacheDir, scratchDir, "*"+scratchSuffix))
	require.Empty(n.t, scratch, "scratch disks")
	require.Empty(n.t, n.findProcesses([]string{n.cfg.StateDir}), "processes")
}
