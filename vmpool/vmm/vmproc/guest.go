// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmproc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/guest/api/transport"
	"github.com/cloudhv/containerd-cloudhv/vmpool/process"
)

const (
	// restSample is the time over which a guest must do nothing to be at rest.
	restSample = 50 * time.Millisecond
	// restTicks is how many clock ticks of processor time still are nothing.
	restTicks = 0
)

// Dial connects to a port of the guest's agent.
func (vm *VM) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	client, err := vm.client()
	if err != nil {
		return nil, err
	}
	conn, err := client.Dial(ctx, port)
	if err != nil {
		select {
		case <-vm.proc.Done():
			return nil, vm.Explain(errors.Join(err, errdefs.ErrUnavailable))
		default:
		}
	}
	return conn, err
}

// client is the way to the guest, opened anew if the guest has broken it off.
func (vm *VM) client() (*transport.Client, error) {
	if err := vm.Check(); err != nil {
		return nil, err
	}
	vm.mu.Lock()
	defer vm.mu.Unlock()
	select {
	case <-vm.guest.Done():
	default:
		return vm.guest, nil
	}
	_ = vm.guest.Close()
	guest, err := vm.openGuest()
	if err != nil {
		return nil, err
	}
	vm.guest = guest
	return guest, nil
}

func (vm *VM) openGuest() (*transport.Client, error) {
	return transport.Open(vm.cfg.Guest, transport.WithWriteTimeout(guestWriteLimit), transport.WithReader(Paced))
}

// Disconnect ends the connections to the guest and waits for its rest.
func (vm *VM) Disconnect(ctx context.Context) error {
	vm.mu.Lock()
	guest := vm.guest
	vm.mu.Unlock()
	_ = guest.Close()
	// The guest sees that its host has gone, and waits for the next; what is
	// interrupted in that every clone would have to finish.
	last := uint64(0)
	for {
		ticks, err := process.Ticks(vm.identity.Pid)
		if err != nil {
			return fmt.Errorf("%s: VM %s: %w: %w", vm.cfg.Driver, vm.cfg.ID, err, errdefs.ErrUnavailable)
		}
		if last != 0 && ticks-last <= restTicks {
			return nil
		}
		last = ticks
		timer := time.NewTimer(restSample)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil // it will do: clones go on from wherever it is
		}
	}
}
