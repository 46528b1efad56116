// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package vmproc is what drivers have in common: a VM's process with its cgroup and
// its logs, the way to its guest, and how it ended. A driver embeds a VM in its own
// and adds what its hypervisor can do.
package vmproc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/api/transport"
	"github.com/cloudhv/containerd-cloudhv/vmpool/confine"
	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
	"github.com/cloudhv/containerd-cloudhv/vmpool/process"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

const (
	// guestWriteLimit bounds a write to a guest that may have stopped reading.
	guestWriteLimit = 10 * time.Second
	// lastWords is how long after a VMM's end it is read what it said.
	lastWords = 2 * time.Second
	// cleanLimit bounds the clean-up after a VM's end.
	cleanLimit = 10 * time.Second
)

// Config describes a VM to this package.
type Config struct {
	// Name is vmm.Driver.Name, Driver what errors begin with.
	Name, Driver string
	// ID, Dir, Cgroup and UID are those of vmm.Config.
	ID, Dir, Cgroup string
	UID             uint32
	// Size is the VM's, by which its cgroup is limited.
	Size vmm.Size
	// Overhead is what the VMM needs beyond its guest's memory, in bytes, and Threads how
	// many it may have beside those of vCPUs.
	Overhead int64
	Threads  int
	// Guest is the endpoint by which this process reaches the guest (transport.Open).
	Guest string
	// Files are the names in Dir that go with the VM.
	Files []string
	// LastWords, if set, waits until all that the VMM said is known, after its end.
	LastWords func()
	// Judge completes how a VM ended. It is called once, after LastWords, when the logs
	// are complete.
	Judge func(vmm.Exit) vmm.Exit
}

// VM is a VM's process. Its methods may be called concurrently, except for New, Start,
// Adopt and Watch, which come first and in that order.
type VM struct {
	cfg      Config
	identity process.Identity
	proc     *process.Handle

	done    chan struct{} // closed when the process has ended and exit is set
	letGo   chan struct{} // closed by Release
	watched sync.WaitGroup
	logs    sync.WaitGroup

	mu        sync.Mutex
	cgroup    *vmm.Cgroup
	group     string
	size      vmm.Size    // what the cgroup's limits are for
	sources   []io.Closer // what logs are copied from
	ended     bool        // no more logs are opened
	guest     *transport.Client
	busy      map[string]chan struct{} // what a call is about
	closed    bool
	requested bool // Kill was called
	exit      vmm.Exit
}

// New describes a VM that has no process yet.
func New(cfg Config) (*VM, error) {
	vm := &VM{
		cfg: cfg, cgroup: vmm.OpenCgroup(cfg.Cgroup), group: cfg.Cgroup, size: cfg.Size,
		done: make(chan struct{}), letGo: make(chan struct{}), busy: make(map[string]chan struct{}),
	}
	var err error
	vm.guest, err = vm.openGuest()
	return vm, err
}

// ID is the VM's.
func (vm *VM) ID() string { return vm.cfg.ID }

// Path is that of a file in the VM's directory.
func (vm *VM) Path(name string) string { return filepath.Join(vm.cfg.Dir, name) }

// State is what Attach needs, with the driver's own data.
func (vm *VM) State(data any) vmm.State {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	own, err := json.Marshal(data)
	if err != nil {
		panic(err) // numbers and strings only
	}
	return vmm.State{
		Driver: vm.cfg.Name, ID: vm.cfg.ID, Dir: vm.cfg.Dir,
		Pid: vm.identity.Pid, StartTime: vm.identity.StartTime, BootID: vm.identity.BootID,
		Cgroup: vm.group, UID: vm.cfg.UID, Data: own,
	}
}

// Start starts the VMM in the VM's cgroup, as the VM's user, and watches it. The command
// says what it may use of the host beside its program's libraries and the accelerator's
// device. The caller closes its files.
func (vm *VM) Start(ctx context.Context, c confine.Command, accelerator string) (*confine.Process, error) {
	c.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	if err := vm.confine(&c, vmm.Device(accelerator)); err != nil {
		return nil, fmt.Errorf("%s: VM %s: %w", vm.cfg.Driver, vm.cfg.ID, err)
	}
	if err := failpoint.At(ctx, failpoint.VMMProcess); err != nil {
		return nil, err
	}
	proc, err := confine.Start(c)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", vm.cfg.Driver, err)
	}
	if err := vm.hold(ctx, proc.Cmd); err != nil {
		proc.Seal()
		return nil, err
	}
	return proc, nil
}

// confine completes a command by what every VMM may use.
func (vm *VM) confine(c *confine.Command, device string) error {
	c.UID = vm.cfg.UID
	if c.UID == 0 {
		return nil
	}
	// It may enter the VM's directory, and neither list nor change it.
	if err := confine.Enterable(vm.cfg.Dir, c.UID); err != nil {
		return err
	}
	execute, read := confine.Program(c.Path)
	c.Execute, c.Read = append(c.Execute, execute...), append(c.Read, read...)
	c.Read = append(c.Read, "/dev/urandom", "/sys/devices/system", "/proc/sys/vm/overcommit_memory")
	c.Write = append(c.Write, os.DevNull)
	if device == "" {
		return nil
	}
	c.Write = append(c.Write, device)
	var err error
	c.Groups, err = confine.DeviceGroups(device)
	return err
}

// hold takes hold of the process that was started.
func (vm *VM) hold(ctx context.Context, cmd *exec.Cmd) error {
	identity, err := process.Identify(cmd.Process.Pid)
	if err == nil {
		vm.proc, err = identity.Open()
	}
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return vm.Explain(fmt.Errorf("%s: ended at once: %w: %w", vm.cfg.Driver, err, errdefs.ErrUnavailable))
	}
	vm.identity = identity
	vm.watched.Go(func() { vm.watch(cmd) })
	if err = failpoint.At(ctx, failpoint.VMMEnter); err == nil {
		err = vm.cgroup.Add(identity.Pid)
	}
	if errors.Is(err, unix.ESRCH) {
		return nil // it has ended: whoever waits for its first answer learns why
	}
	if err != nil {
		return fmt.Errorf("%s: the VMM cannot enter its cgroup: %w", vm.cfg.Driver, err)
	}
	adjustOOM(ctx, identity.Pid)
	return nil
}

// adjustOOM undoes the protection that containerd's own process may have.
func adjustOOM(ctx context.Context, pid int) {
	path := filepath.Join("/proc", strconv.Itoa(pid), "oom_score_adj")
	if err := os.WriteFile(path, []byte("0"), 0); err != nil {
		log.G(ctx).WithError(err).WithField("pid", pid).Warn("cannot reset the oom score of a VMM")
	}
}

// Adopt takes hold of a VMM that runs already. ErrNotFound means that it does not.
// Watch has to follow when its logs are open.
func (vm *VM) Adopt(id process.Identity) error {
	proc, err := id.Open()
	if err != nil {
		return fmt.Errorf("%s: VM %s: %w", vm.cfg.Driver, vm.cfg.ID, err)
	}
	vm.identity, vm.proc = id, proc
	return nil
}

// children are the processes that this one started and let go of: it still has
// to reap them when they end, which Watch takes over.
var children sync.Map // process.Identity to *exec.Cmd

// Watch begins to watch a VMM that was adopted.
func (vm *VM) Watch() {
	var cmd *exec.Cmd
	if ours, ok := children.LoadAndDelete(vm.identity); ok {
		cmd = ours.(*exec.Cmd)
	}
	vm.watched.Go(func() { vm.watch(cmd) })
}

// watch waits for the VMM's end; cmd is nil for a process of an earlier containerd.
func (vm *VM) watch(cmd *exec.Cmd) {
	select {
	case <-vm.letGo:
		if cmd != nil {
			children.Store(vm.identity, cmd)
		}
		return
	case <-vm.proc.Done():
	}
	exit := vmm.Exit{At: time.Now(), Cause: "the VMM's process ended"}
	if cmd != nil {
		_ = cmd.Wait()
		exit.Cause = describe(cmd.ProcessState)
	}
	vm.mu.Lock()
	vm.ended = true
	guest, group, sources := vm.guest, vm.cgroup, vm.sources
	vm.mu.Unlock()
	_ = guest.Close()
	// Filters keep a VMM from starting processes. If there are any all the same, they end
	// with it, and do not hold up what is read of it.
	group.Kill()
	for _, s := range sources {
		if s, ok := s.(interface{ SetReadDeadline(time.Time) error }); ok {
			_ = s.SetReadDeadline(exit.At.Add(lastWords))
		}
	}
	if vm.cfg.LastWords != nil {
		vm.cfg.LastWords()
	}
	vm.logs.Wait()
	ctx, cancel := context.WithTimeout(context.Background(), cleanLimit)
	defer cancel()
	if err := vm.clean(ctx); err != nil {
		log.G(ctx).WithError(err).WithField("vm", vm.cfg.ID).Warn("cannot clean up after a VM")
	}
	exit = vm.cfg.Judge(exit)
	vm.mu.Lock()
	defer vm.mu.Unlock()
	vm.exit = exit
	close(vm.done)
}

// clean removes the files and the cgroup.
func (vm *VM) clean(ctx context.Context) error {
	vm.mu.Lock()
	cgroup := vm.cgroup
	vm.mu.Unlock()
	return errors.Join(cgroup.Remove(ctx), vm.RemoveFiles(vm.cfg.Files...))
}

// RemoveFiles removes files of the VM's directory, those that are there.
func (vm *VM) RemoveFiles(names ...string) error {
	var errs []error
	for _, name := range names {
		if err := os.Remove(vm.Path(name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Pid is the VMM's, Gone is closed when it has ended; Done comes a little later.
func (vm *VM) Pid() int { return vm.identity.Pid }

// Gone is closed when the process has ended.
func (vm *VM) Gone() <-chan struct{} { return vm.proc.Done() }

// Done is closed when the process has ended and Exit tells how.
func (vm *VM) Done() <-chan struct{} { return vm.done }

// Exit tells how the VM ended.
func (vm *VM) Exit() vmm.Exit {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return vm.exit
}

// Requested tells whether Kill was called.
func (vm *VM) Requested() bool {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return vm.requested
}

// Kill ends the VMM at once and removes what it leaves.
func (vm *VM) Kill(ctx context.Context) error {
	vm.mu.Lock()
	vm.requested = true
	vm.mu.Unlock()
	if vm.proc == nil {
		return vm.clean(ctx)
	}
	// A TAP goes with its last file, for which the kernel waits for RCU: it may do so
	// when the process has ended.
	taps := vm.proc.Files(tapDevice, maxTAPs)
	defer func() {
		if len(taps) > 0 {
			go CloseAll(taps)
		}
	}()
	if err := vm.proc.Kill(ctx); err != nil {
		return fmt.Errorf("%s: VM %s: %w", vm.cfg.Driver, vm.cfg.ID, err)
	}
	select {
	case <-vm.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s: kill VM %s: %w", vm.cfg.Driver, vm.cfg.ID, context.Cause(ctx))
	}
}

const (
	// tapDevice is what /proc shows for the files of a TAP, maxTAPs how many are held.
	tapDevice = "/dev/net/tun"
	maxTAPs   = 8
)

// Release lets go of the VM: of its logs, its guest, its process, and what the driver
// closes in also, before anything is waited for.
func (vm *VM) Release(also func()) {
	vm.mu.Lock()
	if !vm.closed {
		vm.closed = true
		close(vm.letGo)
	}
	guest, sources := vm.guest, vm.sources
	vm.mu.Unlock()
	_ = guest.Close()
	also()
	for _, s := range sources {
		_ = s.Close()
	}
	vm.logs.Wait()
	vm.watched.Wait()
	if vm.proc != nil {
		vm.proc.Close()
	}
}

// Check fails with ErrUnavailable if the VM has ended, or was let go.
func (vm *VM) Check() error {
	select {
	case <-vm.done:
		return fmt.Errorf("%s: VM %s: %s: %w", vm.cfg.Driver, vm.cfg.ID, vm.Exit().Cause, errdefs.ErrUnavailable)
	default:
	}
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if vm.closed {
		return fmt.Errorf("%s: VM %s was let go: %w", vm.cfg.Driver, vm.cfg.ID, errdefs.ErrUnavailable)
	}
	return nil
}

// Lock keeps calls about one thing apart. The caller calls the function that it
// returns.
func (vm *VM) Lock(ctx context.Context, id string) (unlock func(), _ error) {
	for {
		vm.mu.Lock()
		other := vm.busy[id]
		if other == nil {
			mine := make(chan struct{})
			vm.busy[id] = mine
			vm.mu.Unlock()
			return func() {
				vm.mu.Lock()
				delete(vm.busy, id)
				vm.mu.Unlock()
				close(mine)
			}, nil
		}
		vm.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}
