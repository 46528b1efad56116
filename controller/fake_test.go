// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/api"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
	"github.com/cloudhv/containerd-cloudhv/vmpool/process"
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

// fakeDriver runs machines that are goroutines, with a process each to be
// identified by. They outlive a Controller, as VMMs outlive containerd.
type fakeDriver struct {
	mu       sync.Mutex
	machines map[int]*fakeMachine
	// bootErr, attachErr make these fail; agent is what new machines' guests do.
	bootErr, attachErr error
	// bootGate, if set, is what a Boot waits for, whatever its caller does.
	bootGate chan struct{}
	// mute makes Attach get no answer until its caller gives up.
	mute     bool
	agent    fakeAgent
	vm       vmFaults
	boots    int
	attaches int
}

// vmFaults make a machine's methods fail.
type vmFaults struct {
	keeps int64 // the memory of which the guest gives back nothing

	nic, resize, disk, unplug error
	// imageDisk gives a machine an image disk, which takes the first that is added.
	imageDisk bool
	// diskStays makes a failed AddDisk leave the disk.
	diskStays bool
	// stuckDial makes Dial wait for the machine's end, whatever its caller does.
	stuckDial bool
	// kill fails as often as it says.
	kill atomic.Int32
	// dieInBoot ends the machine when the guest is dialled first.
	dieInBoot bool
}

func newFakeDriver() *fakeDriver {
	return &fakeDriver{machines: map[int]*fakeMachine{}, agent: fakeAgent{version: api.Version}}
}

func (d *fakeDriver) Name() string { return "fake" }

func (d *fakeDriver) Probe(context.Context) (vmm.Host, error) {
	return vmm.Host{Driver: "fake", Version: "1", Accelerator: "none", Reason: "a test", OverheadBytes: 128 << 20}, nil
}

func (d *fakeDriver) Boot(_ context.Context, cfg vmm.Config) (vmm.VM, error) {
	d.mu.Lock()
	d.boots++
	gate := d.bootGate
	d.mu.Unlock()
	if gate != nil {
		<-gate
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.bootErr != nil {
		return nil, d.bootErr
	}
	if _, err := os.Stat(cfg.Scratch); err != nil {
		return nil, err
	}
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	id, err := process.Identify(cmd.Process.Pid)
	if err != nil {
		return nil, errors.Join(err, cmd.Process.Kill(), cmd.Wait())
	}
	m := &fakeMachine{
		driver: d, cfg: cfg, size: cfg.Size, pid: id.Pid, id: id, cmd: cmd, agent: d.agent,
		done: make(chan struct{}), disks: map[string]int{},
	}
	d.machines[m.pid] = m
	go m.run()
	return &fakeVM{fakeMachine: m}, nil
}

func (d *fakeDriver) Restore(ctx context.Context, cfg vmm.Config, from vmm.Snapshot) (vmm.VM, error) {
	if _, err := os.Stat(filepath.Join(from.Dir, "state")); err != nil {
		return nil, err
	}
	cfg.Size, cfg.Max, cfg.MemoryFile = from.Size, from.Max, ""
	return d.Boot(ctx, cfg)
}

func (d *fakeDriver) Attach(ctx context.Context, s vmm.State) (vmm.VM, error) {
	d.mu.Lock()
	d.attaches++
	mute := d.mute
	d.mu.Unlock()
	if mute {
		<-ctx.Done()
		return nil, fmt.Errorf("ask the monitor: %w", ctx.Err())
	}
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
	id     process.Identity
	cmd    *exec.Cmd
	agent  fakeAgent
	done   chan struct{}
	clock  fakeClock

	mu         sync.Mutex
	size       vmm.Size
	asked      int // how many Resizes there were
	nics       []string
	disks      map[string]int
	added      []vmm.Disk // in order, with the numbers of devices for their paths
	image      string
	configured *guestv1.ConfigureRequest
	resized    []*guestv1.ResizeRequest
	warmed     []*guestv1.WarmUpRequest
	rehearsed  []*guestv1.ConfigureRequest
	exit       vmm.Exit
}

// run waits for the end of the machine's process.
func (m *fakeMachine) run() {
	_ = m.cmd.Wait()
	m.driver.mu.Lock()
	delete(m.driver.machines, m.pid)
	m.driver.mu.Unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.exit.Cause == "" {
		m.exit = vmm.Exit{At: time.Now(), Cause: "killed by somebody"}
	}
	close(m.done)
}

// die ends the machine.
func (m *fakeMachine) die(cause string, requested bool) {
	m.mu.Lock()
	if m.exit.Cause == "" {
		m.exit = vmm.Exit{At: time.Now(), Cause: cause, Requested: requested}
	}
	m.mu.Unlock()
	_ = m.cmd.Process.Kill()
	<-m.done
}

// fakeVM is one process's handle of a machine.
type fakeVM struct {
	*fakeMachine
}

func (v *fakeVM) ID() string { return v.cfg.ID }

func (v *fakeVM) State() vmm.State {
	v.mu.Lock()
	defer v.mu.Unlock()
	return vmm.State{
		Driver: "fake", ID: v.cfg.ID, Dir: v.cfg.Dir, Pid: v.pid, StartTime: v.id.StartTime, BootID: v.id.BootID,
		Cgroup: v.cfg.CgroupPath,
	}
}

func (v *fakeVM) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	if v.driver.vm.dieInBoot {
		v.die("triple fault", false)
	}
	if v.driver.vm.stuckDial {
		<-v.done
	}
	if isClosed(v.done) || port != api.PortRPC {
		return nil, fmt.Errorf("dial: %w", errdefs.ErrUnavailable)
	}
	host, guest := net.Pipe()
	if v.agent.raw != nil {
		go v.babble(guest)
		return host, nil
	}
	go v.serve(guest) //nolint:gosec // a guest outlives the request that dials it
	return host, nil
}

// babble sends what a guest should not.
func (v *fakeVM) babble(conn net.Conn) {
	defer conn.Close()
	if _, err := conn.Read(make([]byte, 4<<10)); err != nil {
		return
	}
	for {
		if _, err := conn.Write(v.agent.raw); err != nil {
			return
		}
	}
}

// serve answers on one connection until its other end is closed.
func (v *fakeVM) serve(conn net.Conn) {
	srv, err := ttrpc.NewServer()
	if err != nil {
		panic(err)
	}
	guestv1.RegisterMachineService(srv, &machineService{v.fakeMachine})
	guestv1.RegisterTaskService(srv, &taskService{m: v.fakeMachine})
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

func (v *fakeVM) AddDisk(_ context.Context, disk vmm.Disk) (string, error) {
	if err := v.alive(); err != nil {
		return "", err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := v.driver.vm.disk; err != nil {
		if v.driver.vm.diskStays {
			v.disks[disk.Serial]++
		}
		return "", err
	}
	if v.disks[disk.Serial] > 0 {
		return "", fmt.Errorf("disk %s: %w", disk.Serial, errdefs.ErrAlreadyExists)
	}
	v.disks[disk.Serial]++
	v.added = append(v.added, numbered(disk))
	if v.driver.vm.imageDisk && v.image == "" {
		v.image = disk.Serial
		return vmm.ImageSerial, nil
	}
	return disk.Serial, nil
}

// numbered is a disk of which the path of a block device's node, which is there for the
// moment, is its number instead.
func numbered(disk vmm.Disk) vmm.Disk {
	var st unix.Stat_t
	if unix.Stat(disk.Path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK {
		disk.Path = fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	}
	return disk
}

func (v *fakeVM) RemoveDisk(_ context.Context, serial string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := v.driver.vm.unplug; err != nil {
		return err
	}
	delete(v.disks, serial)
	if v.image == serial {
		v.image = ""
	}
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
	v.asked++
	if keeps := v.driver.vm.keeps; size.MemoryBytes < keeps {
		v.size = vmm.Size{VCPUs: size.VCPUs, MemoryBytes: keeps}
		return &vmm.KeptError{MemoryBytes: keeps, Wanted: size.MemoryBytes}
	}
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

func (v *fakeVM) Disconnect(context.Context) error { return nil }

func (v *fakeVM) SetCgroup(_ context.Context, path string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.cfg.CgroupPath = path
	return nil
}

func (v *fakeVM) Snapshot(context.Context) (vmm.Snapshot, error) {
	dir := filepath.Dir(v.cfg.MemoryFile)
	s := vmm.Snapshot{Driver: "fake", Dir: dir, Size: v.cfg.Size, Max: v.cfg.Max}
	return s, os.WriteFile(filepath.Join(dir, "state"), []byte("state"), 0o600)
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
