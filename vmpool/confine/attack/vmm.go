// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package attack

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// This file runs in the hypervisor's place.

// VMM is one that its guest has taken over.
type VMM struct {
	// Memory is the descriptor by which it has mapped the snapshot, -1 without one.
	Memory int
	// Attacks are what it can be asked to try.
	Attacks []Attack
}

// Main is called first by the TestMain of a package that uses this one: the program may
// have been run by an attacker.
func Main() {
	if slices.Contains(os.Args, whoAmI) {
		fmt.Print(syscall.Geteuid())
		os.Exit(0)
	}
}

// Serve tries what it is asked for on connections to a socket. It returns with an error.
func (v *VMM) Serve(l net.Listener) error {
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		if err := v.Answer(conn, conn); err != nil {
			return err
		}
		_ = conn.Close()
	}
}

// Answer answers one request.
func (v *VMM) Answer(from io.Reader, to io.Writer) error {
	var t Targets
	if err := json.NewDecoder(from).Decode(&t); err != nil {
		return err
	}
	t.held = v.Memory
	return json.NewEncoder(to).Encode(v.act(&t))
}

// Keys of results that are no attack's name.
const (
	resultAddress   = "address"
	resultProcesses = "processes"
)

// echoed is read from another process's memory.
var echoed = [1]byte{42}

// act does what is asked for and tells what came of each: "" if it was done.
func (v *VMM) act(t *Targets) map[string]string {
	results := map[string]string{resultAddress: fmt.Sprint(uintptr(unsafe.Pointer(&echoed)))}
	switch {
	case t.Processes > 0:
		results[resultProcesses] = fmt.Sprint(forkMany(t.Processes))
	case t.MemoryBytes > 0:
		useMemory(t.MemoryBytes)
	case t.OwnDir != "":
		for _, a := range v.Attacks {
			results[a.Name] = ""
			if err := inThread(func() error { return a.Do(t) }); err != nil {
				results[a.Name] = err.Error()
			}
		}
	}
	return results
}

// inThread runs what may change its thread, which ends then.
func inThread(do func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		done <- do()
	}()
	return <-done
}

// forkMany starts processes that wait for good, and tells how many came to be.
func forkMany(most int) (count int) {
	for ; count < most; count++ {
		pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
		if errno != 0 {
			return count
		}
		if pid == 0 {
			for {
				_, _, _ = unix.RawSyscall(unix.SYS_PPOLL, 0, 0, 0)
			}
		}
	}
	return count
}

// useMemory writes to so much of it.
func useMemory(bytes int) {
	data, err := unix.Mmap(-1, 0, bytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return
	}
	for i := 0; i < len(data); i += 4096 {
		data[i] = 1
	}
}
