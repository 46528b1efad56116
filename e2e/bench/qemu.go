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
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
	"github.com/cloudhv/containerd-cloudhv/guest/api/transport"
	"github.com/cloudhv/containerd-cloudhv/vmpool/sparse"
)

// bareQEMU restores by QEMU: one process, and one connection to its monitor with four
// commands that nobody waits for.
type bareQEMU struct {
	binary string
	args   []string
}

// The files of a snapshot, in our driver's form for QEMU.
const (
	memoryFile = "memory"
	stateFile  = "state"
)

func (q *bareQEMU) copy(dir string) (from string, _ error) {
	memory, err := replaceArg(q.args, "memory-backend-file", "mem-path", filepath.Join(dir, memoryFile))
	if err != nil {
		return "", err
	}
	from = filepath.Dir(memory)
	for _, name := range []string{memoryFile, stateFile} {
		if err := sparse.CopyFile(filepath.Join(dir, name), filepath.Join(from, name)); err != nil {
			return "", err
		}
	}
	return from, nil
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

// The sockets of a VMM of ours, in the order in which it inherits them.
var socketNames = []string{"qmp.sock", "con.sock", "vm.sock", "pod.sock"}

func (q *bareQEMU) restore(_ context.Context, vm *bareVM, dir string) (endpoint string, _ error) {
	args := slices.Clone(q.args)
	if _, err := replaceArg(args, "node-name=scratch", "file.filename", filepath.Join(vm.dir, scratchFile)); err != nil {
		return "", err
	}
	var files []*os.File
	for _, name := range socketNames {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(vm.dir, name), Net: "unix"})
		if err != nil {
			return "", err
		}
		l.SetUnlinkOnClose(false)
		f, err := l.File()
		_ = l.Close()
		if err != nil {
			return "", err
		}
		files = append(files, f)
	}
	if err := vm.start(q.binary, args, files...); err != nil {
		return "", err
	}
	return transport.SerialEndpoint(filepath.Join(vm.dir, socketNames[2])), vm.load(filepath.Join(dir, stateFile))
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
	if err := conn.SetReadDeadline(time.Now().Add(testnode.Scale(time.Minute))); err != nil {
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
