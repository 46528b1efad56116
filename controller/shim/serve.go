// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
)

// flushLimit is how long the end of a shim waits for containerd to take events.
const flushLimit = 2 * time.Second

// LoadConfig reads the configuration in a sandbox's directory.
func LoadConfig(dir string) (*Config, error) {
	data, err := os.ReadFile(filepath.Join(dir, ConfigFile))
	if err != nil {
		return nil, fmt.Errorf("read shim configuration: %w", err)
	}
	var cfg Config
	if err := json.Unmarshal(data, &cfg); err != nil {
		return nil, fmt.Errorf("read shim configuration: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	var errs []error
	for _, f := range []struct{ name, value string }{
		{"sandbox_id", cfg.SandboxID},
		{"namespace", cfg.Namespace},
		{"guest_endpoint", cfg.GuestEndpoint},
		{"ttrpc_address", cfg.TTRPCAddress},
	} {
		if f.value == "" {
			errs = append(errs, fmt.Errorf("shim configuration: %s is missing: %w", f.name, errdefs.ErrInvalidArgument))
		}
	}
	if cfg.SandboxPid == 0 {
		errs = append(errs, fmt.Errorf("shim configuration: sandbox_pid is missing: %w", errdefs.ErrInvalidArgument))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return &cfg, nil
}

// Sockets are the listeners that the controller has made for a shim. Their files are
// inherited.
type Sockets struct {
	// Task is that of the Task API.
	Task net.Listener
	// Forwards are for port-forwards.
	Forwards []*net.TCPListener
}

// Inherit takes the sockets that cfg tells of.
func Inherit(cfg *Config) (_ *Sockets, retErr error) {
	s := &Sockets{}
	defer func() {
		if retErr != nil {
			s.close()
		}
	}()
	var err error
	if s.Task, err = inherit("task socket", ListenFD); err != nil {
		return nil, err
	}
	for i := range cfg.Forwards {
		l, err := inherit("port-forward", ListenFD+1+i)
		if err != nil {
			return nil, err
		}
		tcp, ok := l.(*net.TCPListener)
		if !ok {
			_ = l.Close()
			return nil, fmt.Errorf("port-forward: file descriptor %d is no TCP socket: %w", ListenFD+1+i, errdefs.ErrFailedPrecondition)
		}
		s.Forwards = append(s.Forwards, tcp)
	}
	return s, nil
}

func inherit(name string, fd int) (net.Listener, error) {
	f := os.NewFile(uintptr(fd), name)
	if f == nil {
		return nil, fmt.Errorf("%s: file descriptor %d is not open: %w", name, fd, errdefs.ErrFailedPrecondition)
	}
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("%s: file descriptor %d is no listening socket: %w", name, fd, err)
	}
	return l, nil
}

func (s *Sockets) close() {
	if s.Task != nil {
		_ = s.Task.Close()
	}
	closeAll(s.Forwards)
}

// Serve serves the Task API of the pod in dir, and its port-forwards, until ctx ends. It
// closes sockets and transport. The loss of the VM does not end it: containerd is still to
// learn how the containers ended.
func Serve(ctx context.Context, cfg Config, dir string, sockets *Sockets, transport Guest) error {
	defer sockets.close()
	ctx = log.WithLogger(ctx, log.G(ctx).WithField("sandbox", cfg.SandboxID))
	// What is told at the end needs a context that has not ended.
	s := newService(context.WithoutCancel(ctx), cfg, dir, transport)
	defer s.close(flushLimit)
	server, err := ttrpc.NewServer(
		ttrpc.WithServerHandshaker(ttrpc.UnixSocketRequireSameUser()),
		ttrpc.WithUnaryServerInterceptor(s.intercept))
	if err != nil {
		return fmt.Errorf("make task server: %w", err)
	}
	s.register(server)
	s.forwards.serve(sockets.Forwards)
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	log.G(ctx).Info("shim serves the pod's tasks")
	err = server.Serve(s.ctx, sockets.Task)
	if ctx.Err() != nil {
		log.G(ctx).Info("shim ends")
		return nil
	}
	return fmt.Errorf("serve tasks: %w", err)
}
