// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package qemu runs VMs by QEMU: with KVM where that really works, by pure
// software emulation anywhere else.
package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/vmpool/process"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// Name is the driver's name.
const Name = "qemu"

// DefaultBinary is looked up on PATH.
const DefaultBinary = "qemu-system-x86_64"

// undoLimit bounds what a failed start takes to undo.
const undoLimit = 10 * time.Second

// Driver is QEMU's.
type Driver struct {
	binary string

	mu   sync.Mutex
	host vmm.Host // what the last successful Probe found
}

var _ vmm.Driver = (*Driver)(nil)

// New makes a driver of the QEMU binary, a path or a name on PATH; empty is
// DefaultBinary.
func New(binary string) *Driver {
	if binary == "" {
		binary = DefaultBinary
	}
	return &Driver{binary: binary}
}

// Name is "qemu".
func (d *Driver) Name() string { return Name }

// data is vmm.State.Data.
type data struct {
	Size         vmm.Size `json:"size"`
	Max          vmm.Size `json:"max"`
	ConsoleLimit int64    `json:"console_limit"`
	Base         int64    `json:"base_memory"`
	MemoryFile   string   `json:"memory_file,omitempty"`
	BuiltInNIC   bool     `json:"built_in_nic,omitempty"`
}

// Boot starts QEMU and takes control of it.
func (d *Driver) Boot(ctx context.Context, cfg vmm.Config) (vmm.VM, error) {
	vm, err := d.start(ctx, cfg, nil)
	if err != nil {
		return nil, err
	}
	return vm, nil
}

// start starts QEMU, with the guest's RAM a copy of a snapshot's unless from is
// nil, and takes control of it.
func (d *Driver) start(ctx context.Context, cfg vmm.Config, from *vmm.Snapshot) (_ *machine, retErr error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("qemu: %w", err)
	}
	host, err := d.probed(ctx)
	if err != nil {
		return nil, err
	}
	own := data{
		Size: cfg.Size, Max: cfg.Max, ConsoleLimit: cfg.ConsoleLimit, Base: cfg.Size.MemoryBytes,
		MemoryFile: cfg.MemoryFile, BuiltInNIC: cfg.TAP != nil,
	}
	vm, err := newVM(cfg.ID, cfg.Dir, cfg.CgroupPath, own)
	if err != nil {
		return nil, err
	}
	defer func() {
		if retErr != nil {
			undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoLimit)
			defer cancel()
			retErr = errors.Join(retErr, vm.Kill(undo), vm.Close())
		}
	}()
	if err := vm.cgroup.Make(); err != nil {
		return nil, err
	}
	if err := vm.spawn(ctx, host, cfg, from); err != nil {
		return nil, err
	}
	if err := vm.control(ctx); err != nil {
		return nil, vm.explain(err)
	}
	if from == nil {
		return vm, nil
	}
	if err := vm.load(ctx, from.Dir); err != nil {
		return nil, vm.explain(err)
	}
	return vm, nil
}

// probed is what the last successful Probe found, or a new one's result.
func (d *Driver) probed(ctx context.Context) (vmm.Host, error) {
	d.mu.Lock()
	host := d.host
	d.mu.Unlock()
	if host.Binary != "" {
		return host, nil
	}
	return d.Probe(ctx)
}

// Attach takes up a VM that runs already.
func (d *Driver) Attach(ctx context.Context, state vmm.State) (_ vmm.VM, retErr error) {
	var own data
	if err := json.Unmarshal(state.Data, &own); err != nil {
		return nil, fmt.Errorf("qemu: state of VM %s: %w: %w", state.ID, err, errdefs.ErrInvalidArgument)
	}
	vm, err := newVM(state.ID, state.Dir, state.Cgroup, own)
	if err != nil {
		return nil, err
	}
	id := state.Identity()
	proc, err := id.Open()
	if err != nil {
		return nil, fmt.Errorf("qemu: VM %s: %w", state.ID, err)
	}
	vm.identity, vm.proc = id, proc
	if err := vm.openLogs(ctx); err != nil {
		return nil, errors.Join(err, vm.Close())
	}
	var cmd *exec.Cmd
	if ours, ok := children.LoadAndDelete(id); ok {
		cmd = ours.(*exec.Cmd)
	}
	vm.watched.Go(func() { vm.watch(cmd) })
	err = vm.control(ctx)
	if err == nil {
		err = vm.findSlots(ctx)
	}
	if err != nil {
		return nil, errors.Join(vm.explain(err), vm.Close())
	}
	return vm, nil
}

// spawn starts the process, in its cgroup, with its sockets made.
func (vm *machine) spawn(ctx context.Context, host vmm.Host, cfg vmm.Config, from *vmm.Snapshot) (retErr error) {
	files, err := listen(cfg.Dir)
	defer closeAll(files)
	if err != nil {
		return err
	}
	printed, err := openPipe(filepath.Join(cfg.Dir, logPipe), os.O_RDWR)
	if err != nil {
		return err
	}
	defer printed.Close() //nolint:errcheck // QEMU has its own
	if err := vm.openLogs(ctx); err != nil {
		return err
	}
	cmd := exec.Command(host.Binary, commandLine(cfg, host.Accelerator, from)...)
	cmd.Dir = cfg.Dir
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Stdout, cmd.Stderr = printed, printed
	cmd.ExtraFiles = files
	if cfg.TAP != nil {
		cmd.ExtraFiles = append(cmd.ExtraFiles, cfg.TAP)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("qemu: start: %w", err)
	}
	identity, err := process.Identify(cmd.Process.Pid)
	if err == nil {
		vm.proc, err = identity.Open()
	}
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return vm.explain(fmt.Errorf("qemu: ended at once: %w", err))
	}
	vm.identity = identity
	vm.watched.Go(func() { vm.watch(cmd) })
	if err := vm.cgroup.Add(identity.Pid); err != nil {
		log.G(ctx).WithError(err).WithField("vm", vm.id).Warn("VM runs outside a cgroup of its own")
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

// listen makes QEMU's sockets. The caller closes the files.
func listen(dir string) (_ []*os.File, retErr error) {
	var files []*os.File
	for _, name := range socketNames {
		path := filepath.Join(dir, name)
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return files, err
		}
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			return files, fmt.Errorf("qemu: %w", err)
		}
		l.SetUnlinkOnClose(false)
		f, err := l.File()
		_ = l.Close()
		if err != nil {
			return files, fmt.Errorf("qemu: %w", err)
		}
		files = append(files, f)
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// openPipe makes the FIFO at path unless it is there, and opens it without waiting.
func openPipe(path string, flag int) (*os.File, error) {
	if err := unix.Mkfifo(path, 0o600); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, fmt.Errorf("qemu: make %s: %w", path, err)
	}
	return os.OpenFile(path, flag|unix.O_NONBLOCK, 0)
}
