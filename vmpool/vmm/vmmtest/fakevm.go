// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmmtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/guest/api/transport"
	"github.com/cloudhv/containerd-cloudhv/vmpool/process"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

const (
	vmSocket  = "vm.sock"
	podSocket = "pod.sock"
)

// guest is a fake VM itself, which lives until its process ends.
type guest struct {
	driver   *Driver
	cfg      vmm.Config
	identity process.Identity
	proc     *process.Handle
	stop     context.CancelFunc
	served   sync.WaitGroup
	done     chan struct{} // closed when all has ended and exit is set

	mu     sync.Mutex
	size   vmm.Size
	disks  map[string]vmm.Disk
	image  string // which of them is in the disk that was there from the start
	nics   map[string]vmm.NIC
	paused bool
	exit   vmm.Exit
}

// listen makes the guest's sockets and serves its ports.
func (g *guest) listen() (retErr error) {
	ctx, cancel := context.WithCancel(context.Background())
	g.stop = cancel
	defer func() {
		if retErr != nil {
			retErr = errors.Join(retErr, g.clean())
		}
	}()
	for _, name := range []string{vmm.ConsoleLog, vmm.VMMLog} {
		if err := os.WriteFile(filepath.Join(g.cfg.Dir, name), nil, 0o600); err != nil {
			return err
		}
	}
	mux := transport.NewMux()
	g.driver.mu.Lock()
	defer g.driver.mu.Unlock()
	for port, f := range g.driver.guests {
		l, err := mux.Listen(port)
		if err != nil {
			return err
		}
		g.served.Go(func() { g.accept(ctx, l, f) })
	}
	for _, name := range []string{vmSocket, podSocket} {
		l, err := net.Listen("unix", filepath.Join(g.cfg.Dir, name))
		if err != nil {
			return err
		}
		g.served.Go(func() { _ = mux.ServeListener(ctx, l) })
	}
	return nil
}

func (g *guest) accept(ctx context.Context, l net.Listener, f func(net.Conn)) {
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		g.served.Go(func() {
			defer c.Close() //nolint:errcheck // a test's connection
			f(c)
		})
	}
}

// wait reaps the process and takes the guest down.
func (g *guest) wait(cmd *exec.Cmd) {
	_ = cmd.Wait()
	g.driver.mu.Lock()
	delete(g.driver.vms, g.cfg.ID)
	g.driver.mu.Unlock()
	g.proc.Close()
	_ = g.clean()
	g.mu.Lock()
	if g.exit.Cause == "" {
		g.exit.Cause = "the VMM ended"
		if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			g.exit.Cause = fmt.Sprintf("killed by signal %d", ws.Signal())
		}
	}
	g.exit.At = time.Now()
	g.mu.Unlock()
	close(g.done)
}

// clean ends the guest's listeners and removes its sockets.
func (g *guest) clean() error {
	g.stop()
	g.served.Wait()
	var errs []error
	for _, name := range []string{vmSocket, podSocket} {
		if err := os.Remove(filepath.Join(g.cfg.Dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// vm is one owner's hold on a guest.
type vm struct {
	*guest
	client *transport.Client
	closed sync.Once
}

var _ vmm.VM = (*vm)(nil)

func newVM(g *guest) (*vm, error) {
	c, err := transport.Open(transport.SerialEndpoint(filepath.Join(g.cfg.Dir, vmSocket)))
	if err != nil {
		return nil, err
	}
	return &vm{guest: g, client: c}, nil
}

func (v *vm) ID() string { return v.cfg.ID }

func (v *vm) State() vmm.State {
	v.mu.Lock()
	defer v.mu.Unlock()
	data, err := json.Marshal(v.size)
	if err != nil {
		panic(err) // numbers only
	}
	return vmm.State{
		Driver: Name, ID: v.cfg.ID, Dir: v.cfg.Dir, Cgroup: v.cfg.CgroupPath, Data: data,
		Pid: v.identity.Pid, StartTime: v.identity.StartTime, BootID: v.identity.BootID,
	}
}

// begin checks whether an operation may go on: the VM runs, and no test objects.
func (v *vm) begin(ctx context.Context, op Op) error {
	select {
	case <-v.done:
		return fmt.Errorf("VM %s: %s: %w", v.cfg.ID, v.Exit().Cause, errdefs.ErrUnavailable)
	default:
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-v.done:
			cancel(fmt.Errorf("VM %s: %w", v.cfg.ID, errdefs.ErrUnavailable))
		case <-ctx.Done():
		}
	}()
	return v.driver.check(ctx, op, v.cfg.ID)
}

func (v *vm) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	if err := v.begin(ctx, OpDial); err != nil {
		return nil, err
	}
	v.mu.Lock()
	client := v.client
	v.mu.Unlock()
	return client.Dial(ctx, port)
}

func (v *vm) PodEndpoint() string {
	return transport.SerialEndpoint(filepath.Join(v.cfg.Dir, podSocket))
}

// AddDisk puts a read-only disk into the one that the machine has from its start, if
// that is empty.
func (v *vm) AddDisk(ctx context.Context, disk vmm.Disk) (string, error) {
	if err := disk.Validate(); err != nil {
		return "", err
	}
	if err := v.begin(ctx, OpAddDisk); err != nil {
		return "", err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, ok := v.disks[disk.Serial]; ok {
		return "", fmt.Errorf("disk %s: %w", disk.Serial, errdefs.ErrAlreadyExists)
	}
	v.disks[disk.Serial] = disk
	info, err := os.Stat(disk.Path)
	if err != nil || !disk.ReadOnly || !info.Mode().IsRegular() || v.image != "" {
		return disk.Serial, nil
	}
	v.image = disk.Serial
	return vmm.ImageSerial, nil
}

func (v *vm) RemoveDisk(ctx context.Context, serial string) error {
	if err := v.begin(ctx, OpRemoveDisk); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.disks, serial)
	if v.image == serial {
		v.image = ""
	}
	return nil
}

func (v *vm) AddNIC(ctx context.Context, nic vmm.NIC) error {
	if err := nic.Validate(); err != nil {
		return err
	}
	if err := v.begin(ctx, OpAddNIC); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, ok := v.nics[nic.ID]; ok {
		return fmt.Errorf("NIC %s: %w", nic.ID, errdefs.ErrAlreadyExists)
	}
	nic.Queues = nil
	v.nics[nic.ID] = nic
	return nil
}

func (v *vm) RemoveNIC(ctx context.Context, id string) error {
	if err := v.begin(ctx, OpRemoveNIC); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.nics, id)
	return nil
}

func (v *vm) Resize(ctx context.Context, size vmm.Size) error {
	if err := vmm.CheckResize(size, v.cfg.Size, v.cfg.Max); err != nil {
		return err
	}
	if err := v.begin(ctx, OpResize); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.size = size
	return nil
}

func (v *vm) Pause(ctx context.Context) error { return v.setPaused(ctx, OpPause, true) }

func (v *vm) Resume(ctx context.Context) error { return v.setPaused(ctx, OpResume, false) }

func (v *vm) setPaused(ctx context.Context, op Op, paused bool) error {
	if err := v.begin(ctx, op); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.paused = paused
	return nil
}

func (v *vm) Disconnect(ctx context.Context) error {
	if err := v.begin(ctx, OpDisconnect); err != nil {
		return err
	}
	v.mu.Lock()
	old := v.client
	v.mu.Unlock()
	_ = old.Close()
	client, err := transport.Open(transport.SerialEndpoint(filepath.Join(v.cfg.Dir, vmSocket)))
	if err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.client = client
	return nil
}

func (v *vm) Snapshot(ctx context.Context) (vmm.Snapshot, error) {
	if err := v.begin(ctx, OpSnapshot); err != nil {
		return vmm.Snapshot{}, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.paused || v.cfg.MemoryFile == "" {
		return vmm.Snapshot{}, fmt.Errorf("snapshot of a VM that is not paused, or has no memory file: %w", errdefs.ErrFailedPrecondition)
	}
	dir := filepath.Dir(v.cfg.MemoryFile)
	s := vmm.Snapshot{Driver: Name, Dir: dir, Size: v.size, Max: v.cfg.Max, BuiltInNIC: v.cfg.TAP != nil}
	return s, os.WriteFile(filepath.Join(dir, "state"), []byte(statePrefix+v.cfg.ID), 0o600)
}

func (v *vm) SetCgroup(ctx context.Context, path string) error {
	if err := v.begin(ctx, OpSetCgroup); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.cfg.CgroupPath = path
	return nil
}

func (v *vm) Kill(ctx context.Context) error {
	// A VM that has ended is no error, whatever a test says.
	if err := v.begin(ctx, OpKill); err != nil && !errors.Is(err, errdefs.ErrUnavailable) {
		return err
	}
	v.mu.Lock()
	if v.exit.Cause == "" {
		v.exit = vmm.Exit{Cause: "killed on request", Requested: true}
	}
	v.mu.Unlock()
	if err := v.proc.Signal(syscall.SIGKILL); err != nil {
		return err
	}
	select {
	case <-v.done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (v *vm) Close() error {
	v.mu.Lock()
	client := v.client
	v.mu.Unlock()
	v.closed.Do(func() { _ = client.Close() })
	return nil
}

func (v *vm) Done() <-chan struct{} { return v.done }

func (v *vm) Exit() vmm.Exit {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.exit
}
