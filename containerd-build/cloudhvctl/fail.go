// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/containerd/errdefs"
	"github.com/urfave/cli/v3"
	"golang.org/x/sys/unix"
)

// Exit statuses beside 0. They are part of the interface: docs/cloudhvctl.md.
const (
	exitFailed      = 1
	exitUsage       = 2
	exitUnreachable = 3
	exitNoPlugin    = 4
	exitUnfit       = 5
	exitNoVM        = 6
	exitTimeout     = 7
)

// errUnfit ends a status that has told why the node cannot serve.
var errUnfit = errors.New("the node cannot serve")

// errUsage is the class of what is wrong with the command line.
var errUsage = errors.New("wrong usage")

func usageError(format string, args ...any) error {
	return fmt.Errorf("%w: %s", errUsage, fmt.Sprintf(format, args...))
}

// wrongUsage is what the command line's parser calls.
func wrongUsage(_ context.Context, _ *cli.Command, err error, _ bool) error {
	return fmt.Errorf("%w: %w", errUsage, err)
}

// dialError tells that containerd cannot be reached.
type dialError struct {
	address string
	err     error
}

func (e *dialError) Error() string { return fmt.Sprintf("%s: %v", e.address, e.err) }
func (e *dialError) Unwrap() error { return e.err }

// callError tells of a call that failed.
type callError struct {
	command, address string
	limit            time.Duration
	err              error
}

func (e *callError) Error() string { return fmt.Sprintf("%s: %v", e.command, e.err) }
func (e *callError) Unwrap() error { return e.err }

// explain says what is wrong and what to do about it, and gives the exit status.
func explain(err error) (text string, code int) {
	var dial *dialError
	var call *callError
	switch {
	case errors.Is(err, errUsage):
		return err.Error(), exitUsage
	case errors.As(err, &dial):
		return explainDial(dial), exitUnreachable
	case errors.As(err, &call):
		return explainCall(call)
	default:
		return err.Error(), exitFailed
	}
}

func explainDial(e *dialError) string {
	const other = "name another socket by --address or CONTAINERD_ADDRESS"
	switch {
	case errors.Is(e.err, fs.ErrNotExist):
		return fmt.Sprintf("there is no socket %s: is containerd running (systemctl status containerd)? Or %s", e.address, other)
	case errors.Is(e.err, fs.ErrPermission):
		return fmt.Sprintf("no permission to use %s: run it as root (sudo cloudhvctl ...)", e.address)
	case errors.Is(e.err, unix.ECONNREFUSED):
		return fmt.Sprintf("nobody listens at %s: containerd has ended (systemctl start containerd). Or %s", e.address, other)
	default:
		return fmt.Sprintf("cannot connect to containerd: %v; %s", e.err, other)
	}
}

func explainCall(e *callError) (string, int) {
	switch err := e.err; {
	case errors.Is(err, errUnfit):
		return "the node cannot serve: mend what is listed, and restart containerd", exitUnfit
	case errdefs.IsNotImplemented(err):
		return fmt.Sprintf("the containerd at %s has no cloudhv: `containerd --version` has to name containerd-cloudhv, and its "+
			"configuration must not disable the plugin io.containerd.grpc.v1.cloudhv", e.address), exitNoPlugin
	case errors.Is(err, context.DeadlineExceeded), errdefs.IsDeadlineExceeded(err):
		text := fmt.Sprintf("%s is not over after %v (--timeout)", e.command, e.limit)
		if e.command == "drain" || e.command == "fill" || e.command == "rebuild" {
			text += "; the node goes on with it: see `cloudhvctl status`"
		}
		return text, exitTimeout
	case e.command == "console" && (errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err)):
		return fmt.Sprintf("%v; `cloudhvctl vms` lists them", err), exitNoVM
	case errdefs.IsFailedPrecondition(err):
		return fmt.Sprintf("%s: %v; see `cloudhvctl status`", e.command, err), exitUnfit
	case errdefs.IsInvalidArgument(err):
		return fmt.Sprintf("%s: %v", e.command, err), exitUsage
	case errdefs.IsUnavailable(err) && e.command == "fill":
		return fmt.Sprintf("fill: %v; the pool goes on trying: see `cloudhvctl status`", err), exitFailed
	default:
		return fmt.Sprintf("%s: %v", e.command, err), exitFailed
	}
}
