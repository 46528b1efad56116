// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package qemu

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/guest/api/transport"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmproc"
)

// machine is a running QEMU.
type machine struct {
	*vmproc.VM
	dir string

	mu       sync.Mutex
	mon      *monitor
	slots    [slots]string  // the device in each
	doubt    map[string]int // devices that may be plugged although that failed, by the number of the failure
	failures int            // how many there were
	image    string         // the serial of the disk that is the image disk's content
	// imageDoubt is true when that has to be asked for.
	imageDoubt bool
	// unplugged is true while it is known that no memory is plugged, nor asked for.
	unplugged bool
	own       data
	shutdown  string // reason of QEMU's SHUTDOWN event
}

var _ vmm.VM = (*machine)(nil)

func newVM(id, dir, group string, uid uint32, own data) (*machine, error) {
	vm := &machine{dir: dir, own: own, doubt: make(map[string]int)}
	var err error
	vm.VM, err = vmproc.New(vmproc.Config{
		Name: Name, Driver: Name, ID: id, Dir: dir, Cgroup: group, UID: uid,
		Size: own.Size, Overhead: overheadOf(own.Accelerator), Threads: maxThreads,
		Guest: transport.SerialEndpoint(filepath.Join(dir, vmSocket)),
		Files: append([]string{logPipe}, socketNames...), LastWords: vm.lastWords, Judge: vm.judge,
	})
	return vm, err
}

// State is what Attach needs.
func (vm *machine) State() vmm.State {
	vm.mu.Lock()
	own := vm.own
	vm.mu.Unlock()
	return vm.VM.State(own)
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
	if err := vm.Check(); err != nil {
		return nil, err
	}
	unlock, err := vm.Lock(ctx, monitorSocket)
	if err != nil {
		return nil, err
	}
	defer unlock()
	vm.mu.Lock()
	mon := vm.mon
	vm.mu.Unlock()
	select {
	case <-mon.done:
	default:
		return mon, nil
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
	if err := vm.CopyVMMLog(logPipe); err != nil {
		return err
	}
	var d net.Dialer
	con, err := d.DialContext(ctx, "unix", filepath.Join(vm.dir, consoleSocket))
	if err != nil {
		return fmt.Errorf("qemu: connect to the console: %w", err)
	}
	return vm.CopyConsole(con, vm.own.ConsoleLimit)
}

// lastWords waits until what QEMU said last has been read.
func (vm *machine) lastWords() {
	vm.mu.Lock()
	mon := vm.mon
	vm.mu.Unlock()
	if mon != nil {
		<-mon.done
	}
}

// judge completes exit by what QEMU and the caller said before.
func (vm *machine) judge(exit vmm.Exit) vmm.Exit {
	vm.mu.Lock()
	shutdown := vm.shutdown
	vm.mu.Unlock()
	switch shutdown {
	case "guest-shutdown":
		exit.Requested, exit.Cause = true, "guest powered off"
	case "guest-reset", "guest-panic":
		exit.Cause = vmproc.WhyReset(vm.ConsoleTail())
	default:
		if vm.Requested() {
			exit.Requested, exit.Cause = true, "killed on request"
			break
		}
		exit.Cause += vm.LastLines()
	}
	return exit
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

// PodEndpoint is the shim's way into the guest.
func (vm *machine) PodEndpoint() string {
	return transport.SerialEndpoint(filepath.Join(vm.dir, podSocket))
}

// Close lets go of the VM.
func (vm *machine) Close() error {
	vm.Release(func() {
		vm.mu.Lock()
		mon := vm.mon
		vm.mu.Unlock()
		if mon != nil {
			mon.close()
		}
	})
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
