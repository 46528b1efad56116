// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package vmmtest holds a vmm.Driver that behaves without running VMs, and a
// suite that every driver passes.
package vmmtest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/vmpool/process"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// Name is the fake driver's name.
const Name = "fake"

// Op names what a fake can be told to fail or to hang in.
type Op string

// The operations of drivers and VMs.
const (
	OpProbe      Op = "probe"
	OpBoot       Op = "boot"
	OpRestore    Op = "restore"
	OpAttach     Op = "attach"
	OpDial       Op = "dial"
	OpAddDisk    Op = "add disk"
	OpRemoveDisk Op = "remove disk"
	OpAddNIC     Op = "add nic"
	OpRemoveNIC  Op = "remove nic"
	OpResize     Op = "resize"
	OpPause      Op = "pause"
	OpResume     Op = "resume"
	OpDisconnect Op = "disconnect"
	OpSnapshot   Op = "snapshot"
	OpSetCgroup  Op = "set cgroup"
	OpKill       Op = "kill"
)

// Driver is a vmm.Driver for tests. Its VMs are processes that sleep, so that
// pids, signals and Attach are real; their guests are listeners in the test's own
// process, reached over the same transport as a real guest. VMs outlive Close
// and are found again by Attach of the same Driver. Its methods may be called
// concurrently.
type Driver struct {
	mu     sync.Mutex
	guests map[uint32]func(net.Conn)
	fail   map[Op]func(vmID string) error
	vms    map[string]*guest
	calls  []string
}

var _ vmm.Driver = (*Driver)(nil)

// New makes a Driver whose guests listen nowhere.
func New() *Driver {
	return &Driver{
		guests: make(map[uint32]func(net.Conn)),
		fail:   make(map[Op]func(string) error),
		vms:    make(map[string]*guest),
	}
}

// Handle serves a port of all guests that boot from now on: f is called, in its
// own goroutine, with each connection, which it need not close.
func (d *Driver) Handle(port uint32, f func(net.Conn)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.guests[port] = f
}

// Fail lets an operation fail with err, until it is called with nil.
func (d *Driver) Fail(op Op, err error) {
	d.FailFunc(op, func(string) error { return err })
}

// FailFunc lets f, which gets the VM's ID (none for OpProbe), decide whether an
// operation fails.
func (d *Driver) FailFunc(op Op, f func(vmID string) error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fail[op] = f
}

// errHang is what Hang lets operations fail with, once their context has ended.
var errHang = errors.New("hangs on purpose")

// Hang lets an operation wait until its context ends. Fail(op, nil) ends that
// for later calls.
func (d *Driver) Hang(op Op) { d.Fail(op, errHang) }

// check is called at the beginning of each operation.
func (d *Driver) check(ctx context.Context, op Op, vmID string) error {
	d.mu.Lock()
	f := d.fail[op]
	d.calls = append(d.calls, strings.TrimSpace(string(op)+" "+vmID))
	d.mu.Unlock()
	if f == nil {
		return ctx.Err()
	}
	err := f(vmID)
	if errors.Is(err, errHang) {
		<-ctx.Done()
		return fmt.Errorf("%s: %w", op, context.Cause(ctx))
	}
	return err
}

// Calls lists what was called so far, as "operation vm-id".
func (d *Driver) Calls() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.calls)
}

// VMs lists the IDs of the VMs that run, in order.
func (d *Driver) VMs() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Sorted(maps.Keys(d.vms))
}

// Seen is what a fake VM has been given.
type Seen struct {
	Config vmm.Config
	Size   vmm.Size
	Disks  []vmm.Disk
	// NICs have no files.
	NICs   []vmm.NIC
	Paused bool
}

// Seen returns what a running VM has, or false if there is none of that ID.
func (d *Driver) Seen(vmID string) (Seen, bool) {
	g := d.guest(vmID)
	if g == nil {
		return Seen{}, false
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	s := Seen{Config: g.cfg, Size: g.size, Paused: g.paused}
	for _, serial := range slices.Sorted(maps.Keys(g.disks)) {
		s.Disks = append(s.Disks, g.disks[serial])
	}
	for _, id := range slices.Sorted(maps.Keys(g.nics)) {
		s.NICs = append(s.NICs, g.nics[id])
	}
	return s, true
}

// Die kills a VM's process, as the kernel or an administrator might.
func (d *Driver) Die(vmID string) { d.end(vmID, vmm.Exit{}) }

// PowerOff ends a VM as its own guest does.
func (d *Driver) PowerOff(vmID string) {
	d.end(vmID, vmm.Exit{Cause: "guest powered off", Requested: true})
}

func (d *Driver) end(vmID string, exit vmm.Exit) {
	g := d.guest(vmID)
	if g == nil {
		return
	}
	g.mu.Lock()
	if g.exit.Cause == "" {
		g.exit = exit
	}
	g.mu.Unlock()
	_ = g.proc.Signal(syscall.SIGKILL)
	<-g.done
}

func (d *Driver) guest(vmID string) *guest {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.vms[vmID]
}

// Name is "fake".
func (d *Driver) Name() string { return Name }

// Probe finds a host that can run fakes.
func (d *Driver) Probe(ctx context.Context) (vmm.Host, error) {
	if err := d.check(ctx, OpProbe, ""); err != nil {
		return vmm.Host{}, err
	}
	return vmm.Host{Driver: Name, Binary: "/bin/sleep", Version: "1", Accelerator: "none", Reason: "it runs no VMs"}, nil
}

// Boot starts a process and a guest.
func (d *Driver) Boot(ctx context.Context, cfg vmm.Config) (vmm.VM, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if err := d.check(ctx, OpBoot, cfg.ID); err != nil {
		return nil, err
	}
	if cfg.MemoryFile != "" {
		if err := os.WriteFile(cfg.MemoryFile, []byte("memory of "+cfg.ID), 0o600); err != nil {
			return nil, err
		}
	}
	return d.boot(cfg, cfg.Size)
}

// Restore does as Boot does, with a Snapshot's size.
func (d *Driver) Restore(ctx context.Context, cfg vmm.Config, from vmm.Snapshot) (vmm.VM, error) {
	if from.Driver != Name {
		return nil, fmt.Errorf("snapshot of driver %q: %w", from.Driver, errdefs.ErrInvalidArgument)
	}
	if err := from.CheckTAP(cfg.TAP); err != nil {
		return nil, err
	}
	cfg.Size, cfg.Max = from.Size, from.Max
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if err := d.check(ctx, OpRestore, cfg.ID); err != nil {
		return nil, err
	}
	state, err := os.ReadFile(filepath.Join(from.Dir, "state"))
	if err != nil || !strings.HasPrefix(string(state), statePrefix) {
		return nil, fmt.Errorf("no snapshot in %s: %w", from.Dir, errors.Join(err, errdefs.ErrDataLoss))
	}
	return d.boot(cfg, from.Size)
}

// statePrefix begins the state of a snapshot.
const statePrefix = "state of "

func (d *Driver) boot(cfg vmm.Config, size vmm.Size) (_ vmm.VM, retErr error) {
	d.mu.Lock()
	taken := d.vms[cfg.ID] != nil
	d.mu.Unlock()
	if taken {
		return nil, fmt.Errorf("VM %s: %w", cfg.ID, errdefs.ErrAlreadyExists)
	}
	g := &guest{
		driver: d, cfg: cfg, size: size, done: make(chan struct{}),
		disks: make(map[string]vmm.Disk), nics: make(map[string]vmm.NIC),
	}
	if err := g.listen(); err != nil {
		return nil, err
	}
	cmd := exec.Command("sleep", "infinity")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(err, g.clean())
	}
	defer func() {
		if retErr != nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			retErr = errors.Join(retErr, g.clean())
		}
	}()
	var err error
	if g.identity, err = process.Identify(cmd.Process.Pid); err != nil {
		return nil, err
	}
	if g.proc, err = g.identity.Open(); err != nil {
		return nil, err
	}
	d.mu.Lock()
	d.vms[cfg.ID] = g
	d.mu.Unlock()
	go g.wait(cmd)
	return newVM(g)
}

// Attach finds a VM that this Driver booted.
func (d *Driver) Attach(ctx context.Context, state vmm.State) (vmm.VM, error) {
	if err := d.check(ctx, OpAttach, state.ID); err != nil {
		return nil, err
	}
	g := d.guest(state.ID)
	want := state.Identity()
	if g == nil || g.identity != want {
		return nil, fmt.Errorf("VM %s, process %d: %w", state.ID, state.Pid, errdefs.ErrNotFound)
	}
	return newVM(g)
}

// Stop ends all VMs, for the end of a test.
func (d *Driver) Stop() {
	for _, id := range d.VMs() {
		d.Die(id)
	}
}
