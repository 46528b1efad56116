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

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/api/transport"
	"github.com/cloudhv/containerd-cloudhv/vmpool/process"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

const (
	// vmmLogLimit bounds vmm.VMMLog, in bytes.
	vmmLogLimit = 64 << 10
	// tailBytes is how much of that log tells how a VM ended.
	tailBytes = 1 << 10
	// consoleTail is where a guest's panic is looked for: it comes with a stack.
	consoleTail = 16 << 10
	// consolePause bounds how often console output is read.
	consolePause = 5 * time.Millisecond
	// guestWriteLimit bounds a write to a guest that may have stopped reading.
	guestWriteLimit = 10 * time.Second
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
	slots     [slots]string            // the device in each
	doubt     map[string]int           // devices that may be plugged although that failed, by the number of the failure
	failures  int                      // how many there were
	own       data
	closed    bool
	requested bool   // Kill was called
	shutdown  string // reason of QEMU's SHUTDOWN event
	exit      vmm.Exit
}

var _ vmm.VM = (*machine)(nil)

func newVM(id, dir, group string, own data) (*machine, error) {
	guest, err := openGuest(dir)
	if err != nil {
		return nil, err
	}
	return &machine{
		id: id, dir: dir, group: group, cgroup: vmm.OpenCgroup(group), own: own,
		guest: guest, done: make(chan struct{}), letGo: make(chan struct{}), busy: make(map[string]chan struct{}),
		doubt: make(map[string]int),
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

// monitor is the connection to the monitor, made anew if it was lost.
// ErrUnavailable means that the VM has gone.
func (vm *machine) monitor(ctx context.Context) (*monitor, error) {
	select {
	case <-vm.done:
		return nil, vm.gone()
	default:
	}
	unlock, err := vm.lock(ctx, monitorSocket)
	if err != nil {
		return nil, err
	}
	defer unlock()
	vm.mu.Lock()
	mon, closed := vm.mon, vm.closed
	vm.mu.Unlock()
	select {
	case <-mon.done:
	default:
		return mon, nil
	}
	if closed {
		return nil, fmt.Errorf("qemu: VM %s was let go: %w", vm.id, errdefs.ErrUnavailable)
	}
	// As a rule QEMU is about to end.
	if err := vm.control(ctx); err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return vm.mon, nil
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
	if err := vm.copyLog(pipe, vmm.VMMLog, vmmLogLimit, 0); err != nil {
		return err
	}
	var d net.Dialer
	con, err := d.DialContext(ctx, "unix", filepath.Join(vm.dir, consoleSocket))
	if err != nil {
		return fmt.Errorf("qemu: connect to the console: %w", err)
	}
	vm.con = con
	return vm.copyLog(con, vmm.ConsoleLog, vm.own.ConsoleLimit, consolePause)
}

// copyLog copies until there is no more. It pauses after each read, so that a
// guest that prints without end costs little here; it is the guest that waits.
func (vm *machine) copyLog(from io.Reader, name string, limit int64, pause time.Duration) error {
	to, err := vmm.OpenLog(filepath.Join(vm.dir, name), limit)
	if err != nil {
		return fmt.Errorf("qemu: open log: %w", err)
	}
	vm.logs.Go(func() {
		defer to.Close() //nolint:errcheck // a log
		buf := make([]byte, 8<<10)
		for {
			n, err := from.Read(buf)
			// A full disk costs the log, not the VM.
			_, _ = to.Write(buf[:n])
			if err != nil {
				return
			}
			time.Sleep(pause)
		}
	})
	return nil
}

// children are the processes that this one started and let go of: it still has
// to reap them when they end, which Attach takes over.
var children sync.Map // process.Identity to *exec.Cmd

// watch waits for QEMU's end; cmd is nil for a process of an earlier containerd.
func (vm *machine) watch(cmd *exec.Cmd) {
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
	mon, guest := vm.mon, vm.guest
	vm.mu.Unlock()
	_ = guest.Close()
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
	switch vm.shutdown {
	case "guest-shutdown":
		exit.Requested, exit.Cause = true, "guest powered off"
	case "guest-reset", "guest-panic":
		exit.Cause = whyReset(string(vmm.Tail(filepath.Join(vm.dir, vmm.ConsoleLog), consoleTail)))
	default:
		if vm.requested {
			exit.Requested, exit.Cause = true, "killed on request"
			break
		}
		exit.Cause += quote(vmm.Tail(filepath.Join(vm.dir, vmm.VMMLog), tailBytes))
	}
	return exit
}

// whyReset tells a guest's panic, after which it resets, from a reboot.
func whyReset(console string) string {
	const panicked = "Kernel panic - not syncing: "
	i := strings.LastIndex(console, panicked)
	if i < 0 {
		return "guest rebooted"
	}
	reason, _, _ := strings.Cut(console[i+len(panicked):], "\n")
	return "guest kernel panic" + quote([]byte(reason[:min(len(reason), tailBytes)]))
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
	client, err := vm.client()
	if err != nil {
		return nil, err
	}
	conn, err := client.Dial(ctx, port)
	if err != nil {
		select {
		case <-vm.proc.Done():
			return nil, vm.explain(errors.Join(err, errdefs.ErrUnavailable))
		default:
		}
	}
	return conn, err
}

// client is the way to the guest, opened anew if the guest has broken it off.
func (vm *machine) client() (*transport.Client, error) {
	select {
	case <-vm.done:
		return nil, vm.gone()
	default:
	}
	vm.mu.Lock()
	defer vm.mu.Unlock()
	select {
	case <-vm.guest.Done():
	default:
		return vm.guest, nil
	}
	if vm.closed {
		return nil, fmt.Errorf("qemu: VM %s was let go: %w", vm.id, errdefs.ErrUnavailable)
	}
	_ = vm.guest.Close()
	guest, err := openGuest(vm.dir)
	if err != nil {
		return nil, err
	}
	vm.guest = guest
	return guest, nil
}

func openGuest(dir string) (*transport.Client, error) {
	return transport.Open(transport.SerialEndpoint(filepath.Join(dir, vmSocket)), transport.WithWriteTimeout(guestWriteLimit))
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
	if !vm.closed {
		vm.closed = true
		close(vm.letGo)
	}
	mon, guest := vm.mon, vm.guest
	vm.mu.Unlock()
	_ = guest.Close()
	if mon != nil {
		mon.close()
	}
	if vm.con != nil {
		_ = vm.con.Close()
	}
	if vm.pipe != nil {
		_ = vm.pipe.Close()
	}
	vm.logs.Wait()
	vm.watched.Wait()
	if vm.proc != nil {
		vm.proc.Close()
	}
	return nil
}

// call runs a monitor command. ErrUnavailable means that the VM has gone.
func (vm *machine) call(ctx context.Context, command string, args, result any, files ...*os.File) error {
	mon, err := vm.monitor(ctx)
	if err != nil {
		return err
	}
	return mon.call(ctx, command, args, result, files...)
}

// expect begins to wait for an event; see monitor.expect.
func (vm *machine) expect(ctx context.Context, match func(event) bool) (found <-chan event, stop func(), _ error) {
	mon, err := vm.monitor(ctx)
	if err != nil {
		return nil, nil, err
	}
	found, stop = mon.expect(match)
	return found, stop, nil
}
