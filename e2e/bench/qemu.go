// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/api"
	"github.com/cloudhv/containerd-cloudhv/guest/api/transport"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
	"github.com/cloudhv/containerd-cloudhv/vmpool/sparse"
)

// template is a copy of a snapshot of ours, and how a VMM is started from it.
type template struct {
	dir    string
	binary string
	args   []string
	// made counts VMs, for their names.
	made atomic.Int64
}

// The files of a snapshot, in our driver's form for QEMU.
const (
	memoryFile  = "memory"
	stateFile   = "state"
	scratchFile = "scratch"
)

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
	dir, err := benchDir()
	if err != nil {
		return nil, err
	}
	t := &template{dir: dir, args: openedByPath(lines[pid][1:])}
	defer func() {
		if retErr != nil {
			retErr = errors.Join(retErr, t.remove())
		}
	}()
	if t.binary, err = os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err != nil {
		return nil, err
	}
	memory, err := replaceArg(t.args, "memory-backend-file", "mem-path", filepath.Join(dir, memoryFile))
	if err != nil {
		return nil, err
	}
	for _, name := range []string{memoryFile, stateFile, scratchFile} {
		if err := sparse.CopyFile(filepath.Join(dir, name), filepath.Join(filepath.Dir(memory), name)); err != nil {
			return nil, err
		}
	}
	return t, nil
}

// openedByPath are the arguments of a VMM that opens its files itself: ours inherits
// them in sets.
func openedByPath(args []string) (out []string) {
	paths := map[string]string{}
	for i := 0; i < len(args); i++ {
		if args[i] != "-add-fd" || i+1 == len(args) {
			out = append(out, args[i])
			continue
		}
		i++
		var set, path string
		for option := range strings.SplitSeq(args[i], ",") {
			if v, ok := strings.CutPrefix(option, "set="); ok {
				set = v
			} else if v, ok := strings.CutPrefix(option, "opaque="); ok {
				path = v
			}
		}
		paths["file.filename=/dev/fdset/"+set] = "file.filename=" + path
	}
	for i, arg := range out {
		options := strings.Split(arg, ",")
		for j, o := range options {
			if path, ok := paths[o]; ok {
				options[j] = path
			}
		}
		out[i] = strings.Join(options, ",")
	}
	return out
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
// disk, one process, one connection to its monitor with four commands that nobody
// waits for, and one to the guest.
func (t *template) restore(ctx context.Context) (_ *bareVM, took time.Duration, retErr error) {
	if t == nil {
		return nil, 0, fmt.Errorf("there is no template: %w", errdefs.ErrFailedPrecondition)
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
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
	scratch := filepath.Join(vm.dir, scratchFile)
	if err := sparse.CopyFile(scratch, filepath.Join(t.dir, scratchFile)); err != nil {
		return nil, 0, err
	}
	args := slices.Clone(t.args)
	if _, err := replaceArg(args, "node-name=scratch", "file.filename", scratch); err != nil {
		return nil, 0, err
	}
	if err := vm.start(t.binary, args); err != nil {
		return nil, 0, err
	}
	if err := vm.load(filepath.Join(t.dir, stateFile)); err != nil {
		return nil, 0, err
	}
	err := vm.answer(ctx)
	return vm, time.Since(began), err
}

// The sockets of a VMM of ours, in the order in which it inherits them.
var socketNames = []string{"qmp.sock", "con.sock", "vm.sock", "pod.sock"}

func (vm *bareVM) start(binary string, args []string) error {
	vm.cmd = exec.Command(binary, args...)
	vm.cmd.Dir, vm.cmd.Stderr = vm.dir, os.Stderr
	defer func() {
		for _, f := range vm.cmd.ExtraFiles {
			_ = f.Close()
		}
	}()
	for _, name := range socketNames {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(vm.dir, name), Net: "unix"})
		if err != nil {
			return err
		}
		l.SetUnlinkOnClose(false)
		f, err := l.File()
		_ = l.Close()
		if err != nil {
			return err
		}
		vm.cmd.ExtraFiles = append(vm.cmd.ExtraFiles, f)
	}
	tap, err := makeTAP()
	if err != nil {
		return err
	}
	vm.cmd.ExtraFiles = append(vm.cmd.ExtraFiles, tap)
	return vm.cmd.Start()
}

// makeTAP makes one with a name of the kernel's choice, which goes with its last file.
func makeTAP() (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	ifr, err := unix.NewIfreq("chvbare%d")
	if err == nil {
		ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make a TAP: %w", err), unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), "tap"), nil
}

// load has the VMM load the state, and waits only for what says that this failed.
func (vm *bareVM) load(state string) error {
	f, err := os.Open(state)
	if err != nil {
		return err
	}
	defer f.Close()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: filepath.Join(vm.dir, socketNames[0]), Net: "unix"})
	if err != nil {
		return err
	}
	defer conn.Close()
	send := func(command string, args any, rights []byte) error {
		line, err := json.Marshal(map[string]any{"execute": command, "arguments": args})
		if err != nil {
			return err
		}
		_, _, err = conn.WriteMsgUnix(append(line, '\n'), rights, nil)
		return err
	}
	none := map[string]any{}
	err = errors.Join(
		send("qmp_capabilities", none, nil),
		send("migrate-set-capabilities", map[string]any{"capabilities": []any{map[string]any{"capability": "x-ignore-shared", "state": true}}}, nil),
		send("getfd", map[string]any{"fdname": stateFile}, unix.UnixRights(int(f.Fd()))),
		send("migrate-incoming", map[string]any{"uri": "fd:" + stateFile}, nil),
	)
	if err != nil {
		return fmt.Errorf("the VMM's monitor: %w", err)
	}
	return accepted(conn, 4)
}

// accepted reads as many answers, all of which have to be good.
func accepted(conn net.Conn, answers int) error {
	if err := conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		return err
	}
	s := bufio.NewScanner(conn)
	for answers > 0 && s.Scan() {
		var msg struct {
			Return json.RawMessage `json:"return"`
			Error  json.RawMessage `json:"error"`
		}
		if err := json.Unmarshal(s.Bytes(), &msg); err != nil {
			return err
		}
		if msg.Error != nil {
			return fmt.Errorf("the VMM's monitor: %s: %w", msg.Error, errdefs.ErrUnknown)
		}
		if msg.Return != nil {
			answers--
		}
	}
	if answers > 0 {
		return errors.Join(s.Err(), fmt.Errorf("the VMM's monitor ended: %w", errdefs.ErrUnavailable))
	}
	return nil
}

// answer waits for the agent.
func (vm *bareVM) answer(ctx context.Context) (err error) {
	if vm.guest, err = transport.Open(transport.SerialEndpoint(filepath.Join(vm.dir, socketNames[2]))); err != nil {
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
