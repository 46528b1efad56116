// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package crun runs the OCI runtime, by go-runc, and turns its failures into
// errors that say what crun said.
package crun

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	runc "github.com/containerd/go-runc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	// callLimit bounds each run of crun. It is generous, since software emulation
	// of a loaded machine is slow; nothing waits for it in the ordinary case.
	callLimit = 2 * time.Minute
	// maxLog bounds what is read of crun's log, maxMessage what is kept of a message.
	maxLog     = 64 << 10
	maxMessage = 2 << 10
	// logFile is crun's log in a container's bundle.
	logFile = "crun.log"
)

// Runtime runs crun.
type Runtime struct {
	// Command is the crun binary, Root its state directory.
	Command, Root string
}

// Error is a failure of crun itself: its message is meant for the user, as the
// shim for runc passes runc's on. Its class at the RPC edge is Unknown, as there.
type Error struct {
	// Op is what was tried, such as "create".
	Op string
	// Message is crun's, bounded.
	Message string
	// Err is how crun ended.
	Err error
}

// Error puts crun's message in the words that runc's shim uses.
func (e *Error) Error() string {
	if e.Message == "" {
		return fmt.Sprintf("OCI runtime %s failed: %v", e.Op, e.Err)
	}
	return fmt.Sprintf("OCI runtime %s failed: %s", e.Op, e.Message)
}

// Unwrap returns how crun ended.
func (e *Error) Unwrap() error { return e.Err }

// Process says how to start a process.
type Process struct {
	IO runc.IO
	// Console receives the terminal's master; nil without a terminal.
	Console *runc.Socket
	// PidFile is where crun writes the pid.
	PidFile string
}

// Create creates the container of a bundle and returns its init process's pid.
func (r Runtime) Create(ctx context.Context, id, bundle string, p Process) (int, error) {
	ctx, cancel := detach(ctx)
	defer cancel()
	opts := &runc.CreateOpts{IO: p.IO, PidFile: p.PidFile}
	if p.Console != nil {
		opts.ConsoleSocket = p.Console
	}
	log := filepath.Join(bundle, logFile)
	if err := r.client(log).Create(ctx, id, bundle, opts); err != nil {
		return 0, failure("create", log, err)
	}
	pid, err := runc.ReadPidFile(p.PidFile)
	if err != nil {
		return 0, fmt.Errorf("read pid of container %s: %w", id, err)
	}
	return pid, nil
}

// Exec starts another process in a container and returns its pid.
func (r Runtime) Exec(ctx context.Context, id, dir string, spec specs.Process, p Process) (int, error) {
	ctx, cancel := detach(ctx)
	defer cancel()
	log := filepath.Join(dir, logFile)
	opts := &runc.ExecOpts{IO: p.IO, PidFile: p.PidFile, Detach: true, LogFile: log}
	if p.Console != nil {
		opts.ConsoleSocket = p.Console
	}
	if err := r.client(log).Exec(ctx, id, spec, opts); err != nil {
		return 0, failure("exec", log, err)
	}
	pid, err := runc.ReadPidFile(p.PidFile)
	if err != nil {
		return 0, fmt.Errorf("read pid of a process in container %s: %w", id, err)
	}
	return pid, nil
}

// Start lets a created container run, which has no hooks. It does what `crun start`
// does then, and runs that where this is not possible, for its words: to run another
// program costs an emulated processor ten times as much.
func (r Runtime) Start(ctx context.Context, id, bundle string) error {
	if r.release(id) == nil {
		return nil
	}
	return r.call(ctx, "start", bundle, func(ctx context.Context, c *runc.Runc) error { return c.Start(ctx, id) })
}

// release writes to the FIFO that the container's first process reads before it goes
// on, and which is there until then: libcrun_status_write_exec_fifo of crun's
// src/libcrun/status.c. Without a reader there is an error.
func (r Runtime) release(id string) error {
	path := filepath.Join(r.Root, id, "exec.fifo")
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(fd) //nolint:errcheck // nothing is kept back by a FIFO
	if err := unix.Unlink(path); err != nil {
		return fmt.Errorf("remove %s: %w", path, err)
	}
	if _, err := unix.Write(fd, []byte{0}); err != nil {
		return fmt.Errorf("write to %s: %w", path, err)
	}
	return nil
}

// Pause freezes a container, Resume lets it go on.
func (r Runtime) Pause(ctx context.Context, id, bundle string) error {
	return r.call(ctx, "pause", bundle, func(ctx context.Context, c *runc.Runc) error { return c.Pause(ctx, id) })
}

// Resume lets a paused container go on.
func (r Runtime) Resume(ctx context.Context, id, bundle string) error {
	return r.call(ctx, "resume", bundle, func(ctx context.Context, c *runc.Runc) error { return c.Resume(ctx, id) })
}

// Update changes a container's limits.
func (r Runtime) Update(ctx context.Context, id, bundle string, res *specs.LinuxResources) error {
	return r.call(ctx, "update", bundle, func(ctx context.Context, c *runc.Runc) error { return c.Update(ctx, id, res) })
}

// Delete removes a container that has ended; with force also one that runs, or
// of which only parts exist.
func (r Runtime) Delete(ctx context.Context, id, bundle string, force bool) error {
	return r.call(ctx, "delete", bundle, func(ctx context.Context, c *runc.Runc) error {
		return c.Delete(ctx, id, &runc.DeleteOpts{Force: force})
	})
}

func (r Runtime) call(ctx context.Context, op, bundle string, fn func(context.Context, *runc.Runc) error) error {
	ctx, cancel := detach(ctx)
	defer cancel()
	log := filepath.Join(bundle, logFile)
	if err := fn(ctx, r.client(log)); err != nil {
		return failure(op, log, err)
	}
	return nil
}

func (r Runtime) client(log string) *runc.Runc {
	return &runc.Runc{Command: r.Command, Root: r.Root, Log: log, LogFormat: runc.JSON}
}

// detach keeps a caller that goes away from killing crun half-way.
func detach(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), callLimit)
}

func failure(op, log string, err error) error {
	msg, lerr := lastError(log)
	if lerr != nil {
		err = errors.Join(err, lerr)
	}
	return &Error{Op: op, Message: msg, Err: err}
}

// lastError returns the last error in a log of crun's, "" if there is none.
func lastError(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("read crun's log: %w", err)
	}
	defer f.Close()
	return parseLog(io.LimitReader(f, maxLog)), nil
}

// parseLog reads crun's log: a JSON object a line.
func parseLog(r io.Reader) string {
	var last string
	s := bufio.NewScanner(r)
	s.Buffer(nil, maxLog)
	for s.Scan() {
		var line struct {
			Level string `json:"level"`
			Msg   string `json:"msg"`
		}
		if json.Unmarshal(s.Bytes(), &line) != nil || line.Level != "error" {
			continue
		}
		last = strings.TrimSpace(line.Msg)
	}
	if len(last) > maxMessage {
		last = last[:maxMessage]
	}
	return strings.ToValidUTF8(last, "?")
}
