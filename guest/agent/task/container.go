// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package task

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	runc "github.com/containerd/go-runc"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/cgroup"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/crun"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/reap"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/rootfs"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/stdio"
	"github.com/cloudhv/containerd-cloudhv/guest/api"
)

const (
	// killLimit is how long a killed process may take to end.
	killLimit = 30 * time.Second
	// drainLimit is how long a delete waits for output that a process left, as the
	// shim for runc does.
	drainLimit = 10 * time.Second
	// cleanLimit bounds what is undone after a failure.
	cleanLimit = time.Minute
)

// container is one container. Its verbs that change it hold ops; they are never
// held up by a wait for the container's own progress.
type container struct {
	s      *Service
	id     string
	bundle string
	group  cgroup.Group
	init   *process

	// ops serializes start, pause, resume, update and delete.
	ops   sync.Mutex
	layer *rootfs.Layer
	// sharesPids is true if the end of the first process ends no other.
	sharesPids bool

	mu     sync.Mutex
	paused bool
	execs  map[string]*process
}

func (c *container) rootfs() string { return filepath.Join(c.bundle, "rootfs") }

// process finds one by its exec ID.
func (c *container) process(execID string) (*process, error) {
	if execID == "" {
		return c.init, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.execs[execID]
	if p == nil {
		return nil, fmt.Errorf("process %q of container %s: %w", execID[:min(len(execID), api.MaxIDBytes)], c.id, errdefs.ErrNotFound)
	}
	return p, nil
}

// processes are all of the container's, the first one first.
func (c *container) processes() []*process {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := []*process{c.init}
	for _, p := range c.execs {
		all = append(all, p)
	}
	return all
}

func (c *container) isPaused() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.paused
}

func (c *container) setPaused(v bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.paused = v
}

// initExited is called when the first process was reaped.
func (c *container) initExited(e reap.Exit) {
	c.init.lost()
	go c.end(e)
}

// end tells of the first process's exit, after that of every other process of
// the container: clients may rely on that order, as with runc.
func (c *container) end(e reap.Exit) {
	if c.sharesPids {
		// The kernel ends the others only where it was their namespace's PID 1.
		if err := c.group.Kill(); err != nil {
			log.L.WithError(err).WithField("container", c.id).Warn("cannot kill what is left of a container")
		}
	}
	for _, p := range c.processes()[1:] {
		if st := p.state(); st == stateStarting || st == stateRunning {
			<-p.done
		}
	}
	ooms, err := c.group.OOMKills()
	if err != nil {
		log.L.WithError(err).WithField("container", c.id).Warn("cannot read OOM kills")
	}
	c.init.stopped(e, ooms)
	c.setPaused(false)
}

// launch runs crun, by run, for a process: it gives the pid, and sees to the
// streams, the terminal, and the exit, which may have happened meanwhile.
func (c *container) launch(ctx context.Context, p *process, dir string, terminal bool, st state, exited func(reap.Exit), run func(crun.Process) (int, error)) (retErr error) {
	req := crun.Process{IO: p.io.Runc(), PidFile: filepath.Join(dir, "pid")}
	if terminal {
		socket, err := runc.NewTempConsoleSocket()
		if err != nil {
			return fmt.Errorf("make console socket: %w", err)
		}
		defer socket.Close()
		req.Console = socket
	}
	birth := c.s.cfg.Reaper.Expect()
	defer birth.End()
	pid, err := run(req)
	if err != nil {
		return err
	}
	var master *os.File
	if terminal {
		if master, err = stdio.ReceiveMaster(req.Console); err != nil {
			// crun has succeeded, so this is our own failure; the process must not stay.
			_ = unix.Kill(pid, unix.SIGKILL)
			return err
		}
	}
	p.io.Copy(context.WithoutCancel(ctx), master)
	p.born(pid, st)
	birth.Watch(pid, exited)
	return nil
}

// destroy removes all there is of a container whose processes have ended or are
// to end. It may be repeated after a failure.
func (c *container) destroy(ctx context.Context) error {
	var errs []error
	stateDir := filepath.Join(c.s.cfg.Runtime.Root, c.id)
	if _, err := os.Stat(stateDir); err == nil {
		if err := c.s.cfg.Runtime.Delete(ctx, c.id, c.bundle, true); err != nil {
			log.G(ctx).WithError(err).WithField("container", c.id).Warn("crun could not delete a container")
			errs = append(errs, os.RemoveAll(stateDir))
		}
	}
	errs = append(errs, c.group.Remove(ctx))
	for _, p := range c.processes() {
		p.remove()
	}
	if c.layer != nil {
		errs = append(errs, c.layer.Remove())
	}
	if c.s.cfg.Volumes != nil {
		errs = append(errs, c.s.cfg.Volumes.Release(ctx, c.id))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove container %s: %w", c.id, err)
	}
	if err := os.RemoveAll(c.bundle); err != nil {
		return fmt.Errorf("remove container %s: %w", c.id, err)
	}
	return nil
}

// detached is a context for work that must not end with its request.
func detached(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), limit)
}
