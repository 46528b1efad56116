// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
	"github.com/cloudhv/containerd-cloudhv/guest/api"
	"github.com/cloudhv/containerd-cloudhv/guest/api/transport"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
	"github.com/cloudhv/containerd-cloudhv/vmpool/sparse"
)

// template is a copy of a snapshot of ours, and how a VMM is started from it.
type template struct {
	dir string
	hypervisor
	// made counts VMs, for their names.
	made atomic.Int64
}

// hypervisor restores a VM without us, by the shortest way that there is.
type hypervisor interface {
	// copy copies the snapshot's files, but for the disk, and returns where they are.
	copy(dir string) (from string, _ error)
	// restore starts a VM with the disk in its directory from the copy in dir, and returns
	// how its agent is reached.
	restore(ctx context.Context, vm *bareVM, dir string) (endpoint string, _ error)
}

// scratchFile is the disk, in a snapshot and beside a VM.
const scratchFile = "scratch"

// isCloudHypervisor tells the hypervisors apart, by a program's path.
func isCloudHypervisor(binary string) bool {
	return strings.HasPrefix(filepath.Base(binary), "cloud-hypervisor")
}

// copyTemplate copies the snapshot of a VMM that was restored by us, and takes over
// its arguments.
func copyTemplate(pid int) (_ *template, retErr error) {
	lines, err := commandLines()
	if err != nil {
		return nil, err
	}
	if len(lines[pid]) == 0 {
		return nil, fmt.Errorf("the VMM %d has ended: %w", pid, errdefs.ErrNotFound)
	}
	binary, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return nil, err
	}
	t := &template{}
	if isCloudHypervisor(binary) {
		t.hypervisor = &bareCloudHypervisor{binary: binary, pid: pid, args: lines[pid][1:]}
	} else {
		t.hypervisor = &bareQEMU{binary: binary, args: openedByPath(lines[pid][1:])}
	}
	if t.dir, err = benchDir(); err != nil {
		return nil, err
	}
	from, err := t.copy(t.dir)
	if err == nil {
		err = sparse.CopyFile(filepath.Join(t.dir, scratchFile), filepath.Join(from, scratchFile))
	}
	if err != nil {
		return nil, errors.Join(err, t.remove())
	}
	return t, nil
}

// remove removes the copy. It may be nil.
func (t *template) remove() error {
	if t == nil {
		return nil
	}
	return os.RemoveAll(t.dir)
}

// bareVM is a VMM that nobody but us knows.
type bareVM struct {
	cmd   *exec.Cmd
	dir   string
	guest *transport.Client
}

// restore starts a VM from the template and waits for its agent's answer: a copy of the
// disk, one process, what it has to be told, and one connection to the guest.
func (t *template) restore(ctx context.Context) (_ *bareVM, took time.Duration, retErr error) {
	if t == nil {
		return nil, 0, fmt.Errorf("there is no template: %w", errdefs.ErrFailedPrecondition)
	}
	ctx, cancel := context.WithTimeout(ctx, testnode.Scale(time.Minute))
	defer cancel()
	began := time.Now()
	vm := &bareVM{dir: filepath.Join(t.dir, strconv.FormatInt(t.made.Add(1), 10))}
	if err := os.Mkdir(vm.dir, 0o700); err != nil {
		return nil, 0, err
	}
	defer func() {
		if retErr != nil {
			retErr = errors.Join(retErr, vm.end())
		}
	}()
	if err := sparse.CopyFile(filepath.Join(vm.dir, scratchFile), filepath.Join(t.dir, scratchFile)); err != nil {
		return nil, 0, err
	}
	endpoint, err := t.hypervisor.restore(ctx, vm, t.dir)
	if err != nil {
		return nil, 0, err
	}
	err = vm.answer(ctx, endpoint)
	return vm, time.Since(began), err
}

// start starts the VMM with a TAP of its own as the last of its files; see launch.
func (vm *bareVM) start(binary string, args []string, files ...*os.File) error {
	tap, _, err := makeTAP()
	if err != nil {
		closeAll(files)
		return err
	}
	return vm.launch(binary, args, append(files, tap)...)
}

// launch starts the VMM in its directory, with these files as its descriptors from 3 on. They
// are closed here.
func (vm *bareVM) launch(binary string, args []string, files ...*os.File) error {
	defer closeAll(files)
	vm.cmd = exec.Command(binary, args...)
	vm.cmd.Dir, vm.cmd.Stderr, vm.cmd.ExtraFiles = vm.dir, os.Stderr, files
	return vm.cmd.Start()
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// makeTAP makes one with a name of the kernel's choice, which goes with its last file.
func makeTAP() (_ *os.File, name string, _ error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, "", fmt.Errorf("open /dev/net/tun: %w", err)
	}
	ifr, err := unix.NewIfreq("chvbare%d")
	if err == nil {
		ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}
	if err != nil {
		return nil, "", errors.Join(fmt.Errorf("make a TAP: %w", err), unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), "tap"), ifr.Name(), nil
}

// answer waits for the agent.
func (vm *bareVM) answer(ctx context.Context, endpoint string) (err error) {
	if vm.guest, err = transport.Open(endpoint); err != nil {
		return err
	}
	conn, err := vm.guest.Dial(ctx, api.PortRPC)
	if err != nil {
		return err
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	_, err = guestv1.NewMachineClient(client).Info(ctx, &guestv1.InfoRequest{})
	return err
}

// end kills the VMM and removes its files.
func (vm *bareVM) end() error {
	var errs []error
	if vm.guest != nil {
		errs = append(errs, vm.guest.Close())
	}
	if vm.cmd != nil && vm.cmd.Process != nil {
		errs = append(errs, vm.cmd.Process.Kill())
		err := vm.cmd.Wait()
		if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			errs = append(errs, fmt.Errorf("the VMM ended by itself: %w", errors.Join(err, errdefs.ErrUnknown)))
		}
	}
	return errors.Join(append(errs, os.RemoveAll(vm.dir))...)
}
