// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/cloudhv/containerd-cloudhv/guest/api/transport"
	"github.com/cloudhv/containerd-cloudhv/vmpool/process"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

const (
	// vmmLogLimit bounds vmm.VMMLog, in bytes.
	vmmLogLimit = 64 << 10
	// tailBytes is how much of that log tells how a VM ended.
	tailBytes = 1 << 10
	// cleanLimit bounds the clean-up after a VM's end.
	cleanLimit = 10 * time.Second
)

// machine is a running QEMU.
type machine struct {
	id, dir  string
	cgroup   *vmm.Cgroup
	group    string
	identity process.Identity
	proc     *process.Handle

	done    chan struct{} // closed when QEMU has ended and exit is set
	letGo   chan struct{} // closed by Close
	watched sync.WaitGroup
	logs    sync.WaitGroup
	con     net.Conn
	pipe    *os.File

	mu        sync.Mutex
	guest     *transport.Client
	mon       *monitor
	busy      map[string]chan struct{} // devices that a call is about
	own       data
	closed    bool
	requested bool   // Kill was called
	shutdown  string // reason of QEMU's SHUTDOWN event
	exit      vmm.Exit
}

var _ vmm.VM = (*machine)(nil)

func newVM(id, dir, group string, own data) (*machine, error) {
	guest, err := transport.Open(transport.SerialEndpoint(filepath.Join(dir, vmSocket)))
	if err != nil {
		return nil, err
	}
	return &machine{
		id: id, dir: dir, group: group, cgroup: vmm.OpenCgroup(group), own: own,
		guest: guest, done: make(chan struct{}), letGo: make(chan struct{}), busy: make(map[string]chan struct{}),
	}, nil
}

// ID is the VM's.
func (vm *machine) ID() string { return vm.id }

// State is what Attach needs.
func (vm *machine) State() vmm.State {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	own, err := json.Marshal(vm.own)
	if err != nil {
		panic(err) // numbers only
	}
	return vmm.State{
		Driver: Name, ID: vm.id, Dir: vm.dir,
		Pid: vm.identity.Pid, StartTime: vm.identity.StartTime, BootID: vm.identity.BootID,
		Cgroup: vm.group, Data: own,
	}
}

// control connects to the monitor.
func (vm *machine) control(ctx context.Context) error {
	mon, err := dialMonitor(ctx, filepath.Join(vm.dir, monitorSocket), vm.onEvent)
	if err != nil {
		return err
	}
	vm.mu.Lock()
	defer vm.mu.Unlock()
	vm.mon = mon
	return nil
}

// monitor is nil before control.
func (vm *machine) monitor() *monitor {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return vm.mon
}

// openLogs copies the console and what QEMU prints to their bounded logs. While
// containerd is away nobody reads: QEMU then drops console output, and keeps a
// pipe's worth of its own.
func (vm *machine) openLogs(ctx context.Context) error {
	pipe, err := openPipe(filepath.Join(vm.dir, logPipe), os.O_RDONLY)
	if err != nil {
		return err
	}
	vm.pipe = pipe
	if err := vm.copyLog(pipe, vmm.VMMLog, vmmLogLimit); err != nil {
		return err
	}
	var d net.Dialer
	con, err := d.DialContext(ctx, "unix", filepath.Join(vm.dir, consoleSocket))
	if err != nil {
		return fmt.Errorf("qemu: connect to the console: %w", err)
	}
	vm.con = con
	return vm.copyLog(con, vmm.ConsoleLog, vm.own.ConsoleLimit)
}

func (vm *machine) copyLog(from io.Reader, name string, limit int64) error {
	to, err := vmm.OpenLog(filepath.Join(vm.dir, name), limit)
	if err != nil {
		return fmt.Errorf("qemu: open log: %w", err)
	}
	vm.logs.Go(func() {
		defer to.Close() //nolint:errcheck // a log
		buf := make([]byte, 4<<10)
		for {
			n, err := from.Read(buf)
			// A full disk costs the log, not the VM.
			_, _ = to.Write(buf[:n])
			if err != nil {
				return
			}
		}
	})
	return nil
}

// watch waits for QEMU's end; cmd is nil for a process of an earlier containerd.
func (vm *machine) watch(cmd *exec.Cmd) {
	<-vm.proc.Done()
	exit := vmm.Exit{At: time.Now(), Cause: "the VMM's process ended"}
	if cmd != nil {
		_ = cmd.Wait()
		exit.At, exit.Cause = time.Now(), describe(cmd.ProcessState)
	}
	vm.mu.Lock()
	closed, mon := vm.closed, vm.mon
	vm.mu.Unlock()
	if closed {
		return
	}
	_ = vm.guest.Close()
	// What QEMU said last is in the connections.
	if mon != nil {
		<-mon.done
	}
	vm.logs.Wait()
	ctx, cancel := context.WithTimeout(context.Background(), cleanLimit)
	defer cancel()
	if err := vm.clean(ctx); err != nil {
		log.G(ctx).WithError(err).WithField("vm", vm.id).Warn("cannot clean up after a VM")
	}
	vm.mu.Lock()
	defer vm.mu.Unlock()
	vm.exit = vm.judge(exit)
	close(vm.done)
}

// judge completes exit by what QEMU and the caller said before.
func (vm *machine) judge(exit vmm.Exit) vmm.Exit {
	switch {
	case vm.requested:
		exit.Requested, exit.Cause = true, "killed on request"
	case vm.shutdown == "guest-shutdown":
		exit.Requested, exit.Cause = true, "guest powered off"
	case vm.shutdown == "guest-reset", vm.shutdown == "guest-panic":
		exit.Cause = "guest kernel panic or reset" + quote(vmm.Tail(filepath.Join(vm.dir, vmm.ConsoleLog), tailBytes))
	default:
		exit.Cause += quote(vmm.Tail(filepath.Join(vm.dir, vmm.VMMLog), tailBytes))
	}
	return exit
}

func describe(state *os.ProcessState) string {
	if status, ok := state.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return fmt.Sprintf("the VMM was killed by signal %d (%s)", status.Signal(), status.Signal())
	}
	return fmt.Sprintf("the VMM exited with code %d", state.ExitCode())
}

func quote(tail []byte) string {
	text := strings.TrimSpace(strings.ToValidUTF8(string(tail), "?"))
	if text == "" {
		return ""
	}
	return fmt.Sprintf(": %q", text)
}

// explain adds to an error how QEMU ended, if it has.
func (vm *machine) explain(err error) error {
	if vm.proc == nil {
		return fmt.Errorf("%w%s", err, quote(vmm.Tail(filepath.Join(vm.dir, vmm.VMMLog), tailBytes)))
	}
	// A connection is lost a moment before the process has ended.
	timer := time.NewTimer(time.Second)
	defer timer.Stop()
	select {
	case <-vm.done:
		return fmt.Errorf("%w: %s", err, vm.Exit().Cause)
	case <-timer.C:
		return err
	}
}

func (vm *machine) onEvent(e event) {
	if e.Name != "SHUTDOWN" {
		return
	}
	var reason struct {
		Reason string `json:"reason"`
	}
	if json.Unmarshal(e.Data, &reason) == nil {
		vm.mu.Lock()
		vm.shutdown = reason.Reason
		vm.mu.Unlock()
	}
}

// Dial connects to a port of the guest's agent.
func (vm *machine) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	select {
	case <-vm.done:
		return nil, vm.gone()
	default:
	}
	conn, err := vm.guest.Dial(ctx, port)
	if err != nil {
		select {
		case <-vm.proc.Done():
			return nil, vm.explain(errors.Join(err, errdefs.ErrUnavailable))
		default:
		}
	}
	return conn, err
}

func (vm *machine) gone() error {
	return fmt.Errorf("qemu: VM %s: %s: %w", vm.id, vm.Exit().Cause, errdefs.ErrUnavailable)
}

// PodEndpoint is the shim's way into the guest.
func (vm *machine) PodEndpoint() string {
	return transport.SerialEndpoint(filepath.Join(vm.dir, podSocket))
}

// Done is closed when QEMU has ended.
func (vm *machine) Done() <-chan struct{} { return vm.done }

// Exit tells how QEMU ended.
func (vm *machine) Exit() vmm.Exit {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return vm.exit
}

// Kill ends QEMU at once and removes what it leaves.
func (vm *machine) Kill(ctx context.Context) error {
	vm.mu.Lock()
	vm.requested = true
	vm.mu.Unlock()
	if vm.proc == nil {
		return vm.clean(ctx)
	}
	if err := vm.proc.Signal(unix.SIGKILL); err != nil {
		return fmt.Errorf("qemu: kill VM %s: %w", vm.id, err)
	}
	select {
	case <-vm.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("qemu: kill VM %s: %w", vm.id, context.Cause(ctx))
	}
}

// clean removes the sockets and the cgroup.
func (vm *machine) clean(ctx context.Context) error {
	errs := []error{vm.cgroup.Remove(ctx)}
	for _, name := range append([]string{logPipe}, socketNames...) {
		if err := os.Remove(filepath.Join(vm.dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Close lets go of the VM.
func (vm *machine) Close() error {
	vm.mu.Lock()
	vm.closed = true
	mon := vm.mon
	vm.mu.Unlock()
	_ = vm.guest.Close()
	if mon != nil {
		mon.close()
	}
	if vm.con != nil {
		_ = vm.con.Close()
	}
	if vm.pipe != nil {
		_ = vm.pipe.Close()
	}
	if vm.proc != nil {
		vm.proc.Close()
	}
	vm.logs.Wait()
	return nil
}

// call runs a monitor command. ErrUnavailable means that the VM has gone.
func (vm *machine) call(ctx context.Context, command string, args, result any, files ...*os.File) error {
	select {
	case <-vm.done:
		return vm.gone()
	default:
		return vm.monitor().call(ctx, command, args, result, files...)
	}
}
