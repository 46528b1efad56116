// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"errors"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/controller/config"
	"github.com/cloudhv/containerd-cloudhv/controller/network"
	"github.com/cloudhv/containerd-cloudhv/controller/rootfs"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// fakeNetwork counts what is connected.
type fakeNetwork struct {
	mu        sync.Mutex
	connected map[string]int
	err       error
	listenErr error
	// disconnectErr fails as often as it says.
	disconnectErr int
}

func (*fakeNetwork) MakeTAP(string) (*os.File, error) { return os.Open(os.DevNull) }

func (f *fakeNetwork) Read(context.Context, string) (*network.Network, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &network.Network{Interfaces: []*guestv1.Interface{{Name: "eth0"}, {Name: "eth1"}}}, f.err
}

func (f *fakeNetwork) Join(_ context.Context, ns string, n *network.Network, _ string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	n.NICs = []vmm.NIC{{ID: "nic1", MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, MTU: 1500}}
	f.connected[ns]++
	return nil
}

func (f *fakeNetwork) Listen(context.Context, string) (*network.Forward, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.listenErr != nil {
		return nil, f.listenErr
	}
	l, err := os.Open(os.DevNull)
	return &network.Forward{Listeners: []*os.File{l}}, err
}

func (f *fakeNetwork) Clear(ctx context.Context, ns string) error { return f.Disconnect(ctx, ns) }

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
	return containers.Container{ID: id, SandboxID: sb, Image: "r/" + id + ":1", Snapshotter: "overlayfs", SnapshotKey: id[:1]}, nil
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
	// Sockets lie in it: t.TempDir's paths are too long.
	state, err := os.MkdirTemp("", "chv") //nolint:usetesting
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
		Settings: n.cfg, Drivers: []vmm.Driver{n.driver}, Driver: n.driver, Host: host, DriverReason: "a test has no other",
		Sandboxes: n.sandboxes, Containers: n.containers, Images: n.images, Network: n.net, TTRPCAddress: "/run/x.ttrpc",
	})
}

// restart makes a new Controller of what the old one left, as a new containerd
// does. What happens during its absence is not seen by the old one's watchers.
func (n *node) restart(during ...func(*node)) {
	n.t.Helper()
	n.letGo(during...)
	n.images.mu.Lock()
	n.images.pins = map[string]int{}
	n.images.mu.Unlock()
	n.Controller = n.controller()
	require.NoError(n.t, n.Recover(n.t.Context()))
}

// letGo ends the Controller's watching.
func (n *node) letGo(during ...func(*node)) {
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
		if p.held != nil {
			_ = p.held.Close()
		}
		p.mu.Unlock()
	}
	for _, f := range during {
		time.Sleep(50 * time.Millisecond) // for the watchers to be gone
		f(n)
	}
}

// end removes all sandboxes, and the machines that a failed test has lost.
func (n *node) end() {
	for _, p := range n.all() {
		_ = n.Shutdown(n.ctx(), p.id)
	}
	for _, m := range n.machines() {
		m.die("lost", false)
	}
}

func (n *node) machines() []*fakeMachine {
	n.driver.mu.Lock()
	defer n.driver.mu.Unlock()
	return slices.Collect(maps.Values(n.driver.machines))
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

// requireNoMachines checks that all machines have ended. A process that was killed
// by its identity is noted as ended a moment after.
func (n *node) requireNoMachines() {
	n.t.Helper()
	require.Eventually(n.t, func() bool { return n.driver.running() == 0 }, 5*time.Second, time.Millisecond, "machines")
}

// requireNothing checks that no sandbox has anything on the host.
func (n *node) requireNothing() {
	n.t.Helper()
	require.Empty(n.t, n.all())
	n.requireNoMachines()
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
