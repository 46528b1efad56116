// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package cloudhypervisor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/guest/api/transport"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmproc"
)

// machine is a running Cloud Hypervisor.
type machine struct {
	*vmproc.VM
	dir    string
	api    client
	events events

	mu      sync.Mutex
	plugged map[string]bool // devices that are plugged in
	doubt   map[string]bool // devices that may be, although that failed
	fresh   map[string]use  // devices that the guest may not use yet
	own     data
}

var _ vmm.VM = (*machine)(nil)

func newVM(id, dir, group string, uid uint32, own data) (*machine, error) {
	vm := &machine{
		dir: dir, own: own, api: client{path: filepath.Join(dir, apiSocket)},
		plugged: make(map[string]bool), doubt: make(map[string]bool), fresh: make(map[string]use),
	}
	var err error
	vm.VM, err = vmproc.New(vmproc.Config{
		Driver: "cloud-hypervisor", Name: Name, ID: id, Dir: dir, Cgroup: group, UID: uid,
		Size: own.Size, Overhead: overhead, Threads: maxThreads,
		Guest: transport.VsockEndpoint(filepath.Join(dir, ownDir, guestSocket), transport.VsockVM),
		Files: fileNames, Judge: vm.judge,
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

// PodEndpoint is the shim's way into the guest.
func (vm *machine) PodEndpoint() string {
	return transport.VsockEndpoint(filepath.Join(vm.dir, ownDir, guestSocket), transport.VsockPod)
}

// openPipes reads what the hypervisor prints and tells. While containerd is away
// nobody does: a pipe's worth is kept.
func (vm *machine) openPipes() error {
	if err := vm.CopyVMMLog(logPipe); err != nil {
		return err
	}
	pipe, err := vmproc.OpenPipe(vm.Path(eventPipe), os.O_RDONLY)
	if err != nil {
		return fmt.Errorf("cloud-hypervisor: %w", err)
	}
	return vm.Follow(pipe, func() { vm.events.read(vmproc.Paced(pipe)) })
}

// openConsole copies the console to its bounded log. What it printed before, and while
// containerd was away, the hypervisor has kept, up to 1 MiB.
func (vm *machine) openConsole(ctx context.Context) error {
	var d net.Dialer
	con, err := d.DialContext(ctx, "unix", filepath.Join(vm.dir, ownDir, consoleSocket))
	if err != nil {
		return fmt.Errorf("cloud-hypervisor: connect to the console: %w", errors.Join(err, errdefs.ErrUnavailable))
	}
	return vm.CopyConsole(con, vm.own.ConsoleLimit)
}

// judge completes exit by what the hypervisor, the guest and the caller said before.
func (vm *machine) judge(exit vmm.Exit) vmm.Exit {
	rebooted, shutdown := vm.events.said()
	console := vm.ConsoleTail()
	switch {
	case vm.Requested() && !rebooted && !shutdown:
		exit.Requested, exit.Cause = true, "killed on request"
	case rebooted:
		exit.Cause = vmproc.WhyReset(console)
	case shutdown && strings.Contains(console, "reboot: Power down"):
		exit.Requested, exit.Cause = true, "guest powered off"
	case vm.Requested():
		exit.Requested, exit.Cause = true, "killed on request"
	default:
		exit.Cause += vm.LastLines()
	}
	return exit
}

// Close lets go of the VM.
func (vm *machine) Close() error {
	vm.Release(func() {})
	return nil
}

// put calls a command of the API. ErrUnavailable means that the VM has gone.
func (vm *machine) put(ctx context.Context, command string, args any, files ...*os.File) error {
	return vm.call(ctx, http.MethodPut, command, args, nil, files...)
}

// info asks for the machine's state.
func (vm *machine) info(ctx context.Context) (*vmInfo, error) {
	var info vmInfo
	if err := vm.call(ctx, http.MethodGet, "vm.info", nil, &info); err != nil {
		return nil, err
	}
	return &info, nil
}

func (vm *machine) call(ctx context.Context, method, command string, args, result any, files ...*os.File) error {
	if err := vm.Check(); err != nil {
		return err
	}
	return vm.api.call(ctx, method, command, args, result, files...)
}

// Pause stops the vCPUs.
func (vm *machine) Pause(ctx context.Context) error {
	return vm.enter(ctx, statePaused, "vm.pause")
}

// Resume lets the vCPUs run.
func (vm *machine) Resume(ctx context.Context) error {
	return vm.enter(ctx, stateRunning, "vm.resume")
}

// enter brings the machine into a state, in which it may be already: that the
// hypervisor refuses.
func (vm *machine) enter(ctx context.Context, state, command string) error {
	unlock, err := vm.Lock(ctx, "state")
	if err != nil {
		return fmt.Errorf("cloud-hypervisor: %s: %w", command, err)
	}
	defer unlock()
	err = vm.put(ctx, command, nil)
	if !isAnswer(err) {
		return err
	}
	if info, infoErr := vm.info(ctx); infoErr == nil && info.State == state {
		return nil
	}
	return err
}
