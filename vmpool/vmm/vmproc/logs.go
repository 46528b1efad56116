// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmproc

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

const (
	// vmmLogLimit bounds vmm.VMMLog, in bytes.
	vmmLogLimit = 64 << 10
	// tailBytes is how much of that log tells how a VM ended.
	tailBytes = 1 << 10
	// consoleTail is where a guest's last words are looked for: a panic comes with a stack.
	consoleTail = 16 << 10
	// logPause bounds how often the console and what the VMM prints are read.
	logPause = 5 * time.Millisecond
)

// OpenPipe makes the FIFO at path unless it is there, and opens it without waiting.
func OpenPipe(path string, flag int) (*os.File, error) {
	if err := unix.Mkfifo(path, 0o600); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, fmt.Errorf("make %s: %w", path, err)
	}
	return os.OpenFile(path, flag|unix.O_NONBLOCK, 0)
}

// CopyVMMLog copies what the VMM prints into the FIFO of that name to its log. While
// nobody reads, a pipe's worth of it is kept.
func (vm *VM) CopyVMMLog(name string) error {
	pipe, err := OpenPipe(vm.Path(name), os.O_RDONLY)
	if err != nil {
		return fmt.Errorf("%s: %w", vm.cfg.Driver, err)
	}
	return vm.copyLog(pipe, vmm.VMMLog, vmmLogLimit)
}

// CopyConsole copies the guest's console to its log, which takes at most limit bytes.
// It closes from in the end.
func (vm *VM) CopyConsole(from io.ReadCloser, limit int64) error {
	return vm.copyLog(from, vmm.ConsoleLog, limit)
}

// Follow runs read, which ends when from does, until the VM has ended or is let go.
// from is closed then at the latest.
func (vm *VM) Follow(from io.Closer, read func()) error {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if vm.ended || vm.closed {
		return errors.Join(fmt.Errorf("%s: VM %s has ended: %w", vm.cfg.Driver, vm.cfg.ID, errdefs.ErrUnavailable), from.Close())
	}
	vm.sources = append(vm.sources, from)
	vm.logs.Go(read)
	return nil
}

// copyLog copies until there is no more. It pauses after each read, so that a
// guest that prints without end, or has its VMM print, costs little here; it is the guest
// that waits.
func (vm *VM) copyLog(from io.ReadCloser, name string, limit int64) error {
	to, err := vmm.OpenLog(vm.Path(name), limit)
	if err != nil {
		return errors.Join(fmt.Errorf("%s: open log: %w", vm.cfg.Driver, err), from.Close())
	}
	err = vm.Follow(from, func() {
		defer to.Close() //nolint:errcheck // a log
		buf := make([]byte, 8<<10)
		for {
			n, err := from.Read(buf)
			// A full disk costs the log, not the VM.
			_, _ = to.Write(buf[:n])
			if err != nil {
				return
			}
			time.Sleep(logPause)
		}
	})
	if err != nil {
		_ = to.Close()
	}
	return err
}

// ConsoleTail is what the guest's console printed last.
func (vm *VM) ConsoleTail() string { return string(vmm.Tail(vm.Path(vmm.ConsoleLog), consoleTail)) }

// WhyReset tells, by its console, a guest's panic, after which it resets, from a reboot.
func WhyReset(console string) string {
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

// LastLines is what the VMM printed last, quoted, after a colon; nothing if it
// printed nothing.
func (vm *VM) LastLines() string { return quote(vmm.Tail(vm.Path(vmm.VMMLog), tailBytes)) }

// Explain adds to an error how the VM ended, if it has.
func (vm *VM) Explain(err error) error {
	if vm.proc == nil {
		return fmt.Errorf("%w%s", err, vm.LastLines())
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
