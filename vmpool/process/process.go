// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package process takes hold of processes of ours, also those that an earlier
// containerd started, without ever mistaking another process for them.
package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Identity identifies a process beyond the life of ours: a pid may be another's
// by now, but not with the same start time in the same boot.
type Identity struct {
	Pid int `json:"pid"`
	// StartTime is in clock ticks since boot (field 22 of /proc/pid/stat).
	StartTime uint64 `json:"start_time"`
	BootID    string `json:"boot_id"`
}

// BootID tells one boot of the host from another.
var BootID = sync.OnceValues(func() (string, error) {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read the host's boot ID: %w", err)
	}
	return strings.TrimSpace(string(data)), nil
})

// Identify describes the running process pid. ErrNotFound means that it has ended.
func Identify(pid int) (Identity, error) {
	boot, err := BootID()
	if err != nil {
		return Identity{}, err
	}
	start, err := startTime(pid)
	if err != nil {
		return Identity{}, err
	}
	return Identity{Pid: pid, StartTime: start, BootID: boot}, nil
}

// startTime reads field 22 of /proc/pid/stat. It returns ErrNotFound if there
// is no such process, or only its corpse.
func startTime(pid int) (uint64, error) {
	fields, err := stat(pid)
	if err != nil {
		return 0, err
	}
	return number(pid, fields[19])
}

// Ticks is the processor time that process pid has used, in clock ticks (100 a
// second): fields 14 and 15 of /proc/pid/stat. ErrNotFound means that it has ended.
func Ticks(pid int) (uint64, error) {
	fields, err := stat(pid)
	if err != nil {
		return 0, err
	}
	user, err1 := number(pid, fields[11])
	system, err2 := number(pid, fields[12])
	return user + system, errors.Join(err1, err2)
}

// PSS is the process's proportional set size in bytes: its memory, of which pages
// that several processes map count for their share. ErrNotFound means that it has
// ended.
func (id Identity) PSS() (int64, error) {
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(id.Pid), "smaps_rollup"))
	if err != nil {
		return 0, fmt.Errorf("process %d: %w: %w", id.Pid, err, errdefs.ErrNotFound)
	}
	if now, err := Identify(id.Pid); err != nil || now != id {
		return 0, fmt.Errorf("process %d is another one by now: %w", id.Pid, errdefs.ErrNotFound)
	}
	for line := range bytes.Lines(data) {
		if rest, ok := bytes.CutPrefix(line, []byte("Pss:")); ok {
			kib, err := number(id.Pid, bytes.TrimSpace(bytes.TrimSuffix(bytes.TrimSpace(rest), []byte("kB"))))
			return int64(kib) << 10, err
		}
	}
	return 0, fmt.Errorf("process %d: unexpected smaps_rollup: %w", id.Pid, errdefs.ErrInternal)
}

// stat reads the fields of /proc/pid/stat from the third on.
func stat(pid int) ([][]byte, error) {
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return nil, fmt.Errorf("process %d: %w: %w", pid, err, errdefs.ErrNotFound)
	}
	// The second field is the command in parentheses and may contain anything.
	fields := bytes.Fields(data[bytes.LastIndexByte(data, ')')+1:])
	if len(fields) < 20 {
		return nil, fmt.Errorf("process %d: unexpected stat: %w", pid, errdefs.ErrInternal)
	}
	if state := fields[0][0]; state == 'Z' || state == 'X' {
		return nil, fmt.Errorf("process %d has ended: %w", pid, errdefs.ErrNotFound)
	}
	return fields, nil
}

func number(pid int, field []byte) (uint64, error) {
	n, err := strconv.ParseUint(string(field), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("process %d: unexpected stat: %w", pid, errdefs.ErrInternal)
	}
	return n, nil
}

// Handle is a process that cannot turn into another: signals reach it or nobody.
type Handle struct {
	pid  int
	file *os.File
	done chan struct{}
}

// Open takes hold of the process by a pidfd, or returns ErrNotFound if it has ended.
func (id Identity) Open() (*Handle, error) {
	fd, err := unix.PidfdOpen(id.Pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return nil, fmt.Errorf("process %d: %w", id.Pid, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("watch process %d: %w", id.Pid, err)
	}
	file := os.NewFile(uintptr(fd), "pidfd")
	// The identity is checked with the pidfd in hand, so that it cannot change after.
	if now, err := Identify(id.Pid); err != nil || now != id {
		_ = file.Close()
		return nil, fmt.Errorf("process %d is another one by now: %w", id.Pid, errdefs.ErrNotFound)
	}
	raw, err := file.SyscallConn()
	if err != nil {
		_ = file.Close()
		return nil, fmt.Errorf("watch process %d: %w", id.Pid, err)
	}
	h := &Handle{pid: id.Pid, file: file, done: make(chan struct{})}
	go func() {
		defer close(h.done)
		// The netpoller tells when the pidfd is readable: the process has ended.
		_ = raw.Read(func(fd uintptr) bool {
			fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			n, err := unix.Poll(fds, 0)
			return err == nil && n > 0
		})
	}()
	return h, nil
}

// Done is closed when the process has ended, or Close was called.
func (h *Handle) Done() <-chan struct{} { return h.done }

// Signal sends sig; a process that has ended is no error.
func (h *Handle) Signal(sig unix.Signal) error {
	raw, err := h.file.SyscallConn()
	if err != nil {
		return nil // closed after the end
	}
	var sendErr error
	err = raw.Control(func(fd uintptr) { sendErr = unix.PidfdSendSignal(int(fd), sig, nil, 0) })
	if err != nil || errors.Is(sendErr, unix.ESRCH) {
		return nil
	}
	return sendErr
}

// Files duplicates those of the process's files that /proc shows as path, at most limit
// of them: what the kernel does when the last file of a device is closed, the
// process's end then does not wait for. The caller closes them. A process that is
// ending, or that may not be looked into, gives none.
func (h *Handle) Files(path string, limit int) []*os.File {
	raw, err := h.file.SyscallConn()
	if err != nil {
		return nil
	}
	dir := filepath.Join("/proc", strconv.Itoa(h.pid), "fd")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	var files []*os.File
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(dir, e.Name()))
		n, numErr := strconv.Atoi(e.Name())
		if err != nil || numErr != nil || target != path || len(files) >= limit {
			continue
		}
		// By the pidfd, so that it is no other process's.
		_ = raw.Control(func(fd uintptr) {
			if got, err := unix.PidfdGetfd(int(fd), n, 0); err == nil {
				files = append(files, os.NewFile(uintptr(got), path))
			}
		})
	}
	return files
}

// End sends SIGTERM, after grace SIGKILL, and waits until the process has ended.
func (h *Handle) End(ctx context.Context, grace time.Duration) error {
	if err := h.Signal(unix.SIGTERM); err != nil {
		return fmt.Errorf("end process: %w", err)
	}
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case <-h.done:
		return nil
	case <-timer.C:
	case <-ctx.Done():
	}
	return h.Kill(ctx)
}

// Kill sends SIGKILL and waits until the process has ended.
func (h *Handle) Kill(ctx context.Context) error {
	if err := h.Signal(unix.SIGKILL); err != nil {
		return fmt.Errorf("kill process: %w", err)
	}
	select {
	case <-h.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for a killed process: %w", context.Cause(ctx))
	}
}

// Close lets go of the process without ending it.
func (h *Handle) Close() {
	_ = h.file.Close()
	<-h.done
}
