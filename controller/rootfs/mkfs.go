// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package rootfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// niceness of the child: it yields to pods.
	niceness = 10
	// maxOutput of the child is kept for the error, in bytes.
	maxOutput = 2048
	// killWait is how long a killed child may take to be gone.
	killWait = 5 * time.Second
)

// Builder runs mkfs.erofs.
type Builder struct {
	// Binary is its path; empty looks for mkfs.erofs on PATH.
	Binary string
	// Memory bounds its address space, ImageSize the file it writes, in bytes;
	// 0 means no bound.
	Memory, ImageSize int64

	// attend, if set, looks after the child's process group until its context ends.
	attend func(ctx context.Context, pid int) error
}

// Run writes the tree at dir into the existing file out. Hard links, owners,
// modes, devices, xattrs and modification times to the nanosecond are kept. The
// child does not outlive Run, nor this process.
func (b Builder) Run(ctx context.Context, dir, out, key string) error {
	binary := b.Binary
	if binary == "" {
		binary = "mkfs.erofs"
	}
	path, err := exec.LookPath(binary)
	if err != nil {
		return fmt.Errorf("%w (package erofs-utils): %w", err, errdefs.ErrFailedPrecondition)
	}
	output := &tail{limit: maxOutput}
	args := append(b.limits(), path, "--quiet", "--preserve-mtime", "-U", imageUUID(key), out, dir)
	// The limits hold from the program's first instruction, so prlimit (util-linux)
	// sets them, and not we after its start.
	cmd := exec.CommandContext(ctx, "prlimit", args...)
	cmd.Env = []string{"LC_ALL=C"}
	cmd.Stdout, cmd.Stderr = output, output
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = killWait

	if err := b.wait(ctx, cmd); err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("mkfs.erofs: %w", context.Cause(ctx))
		}
		return fmt.Errorf("mkfs.erofs: %w: %s: %w", err, output, classOf(err))
	}
	return nil
}

// wait runs the child from a thread of its own: the kernel sends the parent
// death signal when the thread that forked ends.
func (b Builder) wait(ctx context.Context, cmd *exec.Cmd) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := cmd.Start(); err != nil {
			result <- err
			return
		}
		pid := cmd.Process.Pid
		err := setNiceness(pid, niceness)
		if b.attend != nil {
			err = errors.Join(err, b.attendUntilExit(ctx, pid))
		}
		result <- errors.Join(err, cmd.Wait())
	}()
	return <-result
}

// attendUntilExit runs attend until the child has ended. It has not been waited for
// then, so that its pid was its own all the time.
func (b Builder) attendUntilExit(ctx context.Context, pid int) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	attended := make(chan error, 1)
	go func() { attended <- b.attend(ctx, pid) }()
	err := error(unix.EINTR)
	for errors.Is(err, unix.EINTR) {
		err = unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
	}
	cancel()
	return errors.Join(err, <-attended)
}

// setNiceness sets that of a process group, all of its threads. One that has ended
// needs none.
func setNiceness(pid, n int) error {
	if err := unix.Setpriority(unix.PRIO_PGRP, pid, n); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("niceness of process %d: %w", pid, err)
	}
	return nil
}

// limits are prlimit's arguments for the child's bounds.
func (b Builder) limits() []string {
	var args []string
	if b.Memory > 0 {
		args = append(args, fmt.Sprintf("--as=%d", b.Memory))
	}
	if b.ImageSize > 0 {
		args = append(args, fmt.Sprintf("--fsize=%d", b.ImageSize))
	}
	return args
}

// classOf tells a host that lacks something from a failure of the program.
func classOf(err error) error {
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() && ws.Signal() == syscall.SIGXFSZ {
			return errdefs.ErrResourceExhausted
		}
	}
	return errdefs.ErrInternal
}

// imageUUID makes a file system UUID of a key, so that equal images are equal files.
func imageUUID(key string) string {
	k := key + strings.Repeat("0", 32)
	return k[:8] + "-" + k[8:12] + "-" + k[12:16] + "-" + k[16:20] + "-" + k[20:32]
}

// tail keeps the last bytes that were written to it.
type tail struct {
	limit int
	buf   []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.buf = append(t.buf, p...)
	if over := len(t.buf) - t.limit; over > 0 {
		t.buf = append(t.buf[:0], t.buf[over:]...)
	}
	return len(p), nil
}

func (t *tail) String() string {
	return string(bytes.TrimSpace(bytes.ToValidUTF8(t.buf, []byte("?"))))
}
