// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/status"

	"github.com/cloudhv/containerd-cloudhv/guest/api"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
	"github.com/cloudhv/containerd-cloudhv/vmpool"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

const (
	// maxGuestText bounds a string from a guest, in bytes.
	maxGuestText = 128
	// maxGuestSteps bounds the steps that a guest reports.
	maxGuestSteps = 64
	// maxGuestError bounds the text of a guest's error.
	maxGuestError = 1024
	// maxGuestAnswer bounds what a guest may send in one call, in bytes. The
	// longest honest answer, a Configure's with all its steps, has a tenth of it.
	maxGuestAnswer = 64 << 10
)

// callGuest dials the guest's agent and makes one call within limit. The
// connection does not outlive the call, so none is open when a VM is
// snapshotted, and a guest that falls silent costs its caller the limit.
func callGuest[T any](ctx context.Context, vm vmm.VM, limit time.Duration,
	call func(context.Context, guestv1.MachineService) (T, error),
) (T, error) {
	return callAgent(ctx, vm, limit, func(ctx context.Context, client *ttrpc.Client) (T, error) {
		return call(ctx, guestv1.NewMachineClient(client))
	})
}

// callTasks is callGuest for the agent's other service.
func callTasks[T any](ctx context.Context, vm vmm.VM, limit time.Duration,
	call func(context.Context, guestv1.TaskService) (T, error),
) (T, error) {
	return callAgent(ctx, vm, limit, func(ctx context.Context, client *ttrpc.Client) (T, error) {
		return call(ctx, guestv1.NewTaskClient(client))
	})
}

func callAgent[T any](ctx context.Context, vm vmm.VM, limit time.Duration,
	call func(context.Context, *ttrpc.Client) (T, error),
) (T, error) {
	var zero T
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	conn, err := vm.Dial(ctx, api.PortRPC)
	if err != nil {
		return zero, fmt.Errorf("dial the guest's agent: %w", sentinel(err, errdefs.ErrUnavailable))
	}
	// A guest that has stopped reading blocks the sending of the request too.
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	answer := &answerConn{Conn: conn}
	client := ttrpc.NewClient(answer)
	defer client.Close()
	resp, err := call(ctx, client)
	if err != nil && ctx.Err() != nil {
		return zero, fmt.Errorf("the guest's agent did not answer in time (%v): %w", limit, context.Cause(ctx))
	}
	if broken := answer.broken.Load(); err != nil && broken != nil {
		return zero, *broken
	}
	if err != nil {
		return zero, guestError(err)
	}
	return resp, nil
}

// guestError gives what an agent answered its class and bounds its text.
func guestError(err error) error {
	if errors.Is(err, ttrpc.ErrClosed) {
		return fmt.Errorf("the connection to the guest's agent was lost: %w", errdefs.ErrUnavailable)
	}
	// Of the status only code and message: its details could be of any type that
	// is known in this process.
	st, _ := status.FromError(err)
	native := errgrpc.ToNative(status.Error(st.Code(), st.Message()))
	text := printable(native.Error(), maxGuestError)
	for _, class := range []error{
		context.DeadlineExceeded, context.Canceled, errdefs.ErrInvalidArgument, errdefs.ErrNotFound, errdefs.ErrAlreadyExists,
		errdefs.ErrFailedPrecondition, errdefs.ErrUnavailable, errdefs.ErrNotImplemented, errdefs.ErrResourceExhausted,
		errdefs.ErrInternal,
	} {
		if errors.Is(native, class) {
			return &agentError{text: text, class: class}
		}
	}
	return &agentError{text: text, class: errdefs.ErrUnknown}
}

// agentError is an error from the guest.
type agentError struct {
	text  string
	class error
}

// Error quotes the guest, so that its words cannot pass for ours.
func (e *agentError) Error() string { return "the guest's agent: " + strconv.Quote(e.text) }

func (e *agentError) Unwrap() error { return e.class }

// guestOf waits until the agent answers, and checks that it is this build's.
func guestOf(ctx context.Context, vm vmm.VM, limit time.Duration) (*guestv1.InfoResponse, error) {
	info, err := callGuest(ctx, vm, limit,
		func(ctx context.Context, m guestv1.MachineService) (*guestv1.InfoResponse, error) {
			return m.Info(ctx, &guestv1.InfoRequest{})
		})
	if err != nil {
		return nil, fmt.Errorf("wait for the guest: %w", withEnd(ctx, vm, err))
	}
	if v := info.GetApiVersion(); v != api.Version {
		return nil, fmt.Errorf("the guest image's agent (%s) speaks version %d of the API, and this plugin version %d; "+
			"install the image of the same build: %w", guestOfInfo(info).Agent, v, api.Version, errdefs.ErrFailedPrecondition)
	}
	return info, nil
}

// withEnd adds to a call's error why the VM has ended, if it has. The end of its
// connections is seen before the end of the VMM's process is.
func withEnd(ctx context.Context, vm vmm.VM, err error) error {
	timer := time.NewTimer(endWait)
	defer timer.Stop()
	select {
	case <-vm.Done():
		return fmt.Errorf("%w: %s", err, vmCause(vm.Exit()))
	case <-ctx.Done():
	case <-timer.C:
	}
	return err
}

// endWait is how long the end of a VM is waited for that does not answer.
const endWait = 200 * time.Millisecond

// guestOfInfo is what a record keeps of an agent's answer.
func guestOfInfo(info *guestv1.InfoResponse) guestInfo {
	return guestInfo{
		Agent:  printable(info.GetAgentVersion(), maxGuestText),
		Kernel: printable(info.GetKernelRelease(), maxGuestText),
	}
}

// waitForGuest waits until the agent answers. Of a VM that was booted it tells
// the boot's parts.
func (c *Controller) waitForGuest(ctx context.Context, p *pod, vm vmm.VM, watch *stopwatch) (guestInfo, error) {
	rec := p.snapshot()
	if rec.Outcome == string(vmpool.Hit) {
		return rec.Guest, nil // it has answered
	}
	info, err := guestOf(ctx, vm, c.cfg.BootTimeout)
	c.report(ctx, vm, err)
	if err != nil {
		tellSilent(ctx, vm)
		return guestInfo{}, err
	}
	g := guestOfInfo(info)
	if rec.Outcome != "" {
		return g, nil // the boot was another's
	}
	// The guest's own clock starts with its kernel. When that was by ours is known
	// to within the time that the answer took.
	limit := uint64(time.Since(watch.start) / time.Microsecond)
	agent, ready := min(info.GetAgentStartUsec(), limit), min(info.GetBootUsec(), limit)
	kernel, up := time.Duration(agent)*time.Microsecond, time.Duration(ready)*time.Microsecond
	begin := max(time.Since(watch.start)-max(kernel, up), 0)
	ctx = trace.ContextWithSpan(ctx, watch.span) // it began before this phase
	watch.guest(ctx, "kernel", begin, kernel)
	if up >= kernel {
		watch.guest(ctx, "agent", begin+kernel, up-kernel)
	}
	bootTimer.Update(watch.since("boot"))
	return g, nil
}

// configureGuest makes the VM the pod's.
func (c *Controller) configureGuest(ctx context.Context, vm vmm.VM, req *guestv1.ConfigureRequest, watch *stopwatch) error {
	begin := time.Since(watch.start)
	resp, err := c.stampedConfigure(ctx, vm, req)
	if err != nil {
		return fmt.Errorf("configure the guest: %w", err)
	}
	// The guest's clock counts from the call's beginning, and cannot get past its end.
	steps, end := resp.GetSteps(), time.Since(watch.start)
	for _, step := range steps[:min(len(steps), maxGuestSteps)] {
		took := time.Duration(min(step.GetUsec(), uint64((end-begin)/time.Microsecond))) * time.Microsecond
		watch.guest(ctx, printable(step.GetName(), maxGuestText), begin, took)
		begin += took
	}
	return nil
}

// resizeGuest tells the agent the size of its VM.
func (c *Controller) resizeGuest(ctx context.Context, vm vmm.VM, size vmm.Size) error {
	return c.askResize(ctx, vm, &guestv1.ResizeRequest{Vcpus: uint32(size.VCPUs), MemoryBytes: uint64(size.MemoryBytes)})
}

// prepareShrink has the agent let go of vCPUs. It refuses if it cannot do without
// memory that is to go.
func (c *Controller) prepareShrink(ctx context.Context, vm vmm.VM, from, to vmm.Size) error {
	req := &guestv1.ResizeRequest{Vcpus: uint32(to.VCPUs)}
	if to.MemoryBytes == from.MemoryBytes {
		return c.askResize(ctx, vm, req)
	}
	req.ShrinkToBytes = uint64(to.MemoryBytes)
	err := c.askResize(ctx, vm, req)
	if errdefs.IsFailedPrecondition(err) {
		return fmt.Errorf("the guest keeps memory in use: %w", err)
	}
	return err
}

func (c *Controller) askResize(ctx context.Context, vm vmm.VM, req *guestv1.ResizeRequest) error {
	_, err := callGuest(ctx, vm, c.cfg.HotPlugTimeout,
		func(ctx context.Context, m guestv1.MachineService) (*guestv1.ResizeResponse, error) {
			return m.Resize(ctx, req)
		})
	return err
}

// powerOff asks the guest to turn itself off and waits until the VMM has ended, or
// until the guest has nothing left to do but that: the VMM can be killed then,
// which is much faster. It fails if neither happens within the limit; the asking,
// if it hangs, ends with the VMM.
func (c *Controller) powerOff(ctx context.Context, vm vmm.VM) error {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.PowerOffTimeout)
	defer cancel()
	quiet := make(chan struct{})
	go func() {
		// The answer may be lost with the VM.
		_, _ = callGuest(ctx, vm, c.cfg.PowerOffTimeout, func(ctx context.Context, m guestv1.MachineService) (any, error) {
			resp, err := m.PowerOff(ctx, &guestv1.PowerOffRequest{})
			if err == nil {
				close(quiet)
			}
			return resp, err
		})
	}()
	select {
	case <-vm.Done():
		return nil
	case <-quiet:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("turn off the guest: %w", context.Cause(ctx))
	}
}

// printable makes a guest's text safe for logs: at most limit bytes, and no
// control characters.
func printable(s string, limit int) string {
	if len(s) > limit {
		s = s[:limit]
	}
	return strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}
