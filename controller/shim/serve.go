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

// Listener is the socket of the Task API that the controller has made.
func Listener() (net.Listener, error) {
	f := os.NewFile(ListenFD, "task socket")
	if f == nil {
		return nil, fmt.Errorf("file descriptor %d is not open: %w", ListenFD, errdefs.ErrFailedPrecondition)
	}
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("file descriptor %d is no listening socket: %w", ListenFD, err)
	}
	return l, nil
}

// Serve serves the Task API of the pod in dir until ctx ends. It closes listener
// and transport. The loss of the VM does not end it: containerd is still to
// learn how the containers ended.
func Serve(ctx context.Context, cfg Config, dir string, listener net.Listener, transport Guest) error {
	ctx = log.WithLogger(ctx, log.G(ctx).WithField("sandbox", cfg.SandboxID))
	// What is told at the end needs a context that has not ended.
	s := newService(context.WithoutCancel(ctx), cfg, dir, transport)
	defer s.close(flushLimit)
	server, err := ttrpc.NewServer(
		ttrpc.WithServerHandshaker(ttrpc.UnixSocketRequireSameUser()),
		ttrpc.WithUnaryServerInterceptor(s.intercept))
	if err != nil {
		_ = listener.Close()
		return fmt.Errorf("make task server: %w", err)
	}
	s.register(server)
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	log.G(ctx).Info("shim serves the pod's tasks")
	err = server.Serve(s.ctx, listener)
	if ctx.Err() != nil {
		log.G(ctx).Info("shim ends")
		return nil
	}
	return fmt.Errorf("serve tasks: %w", err)
}
