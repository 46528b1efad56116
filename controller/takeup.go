// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

const (
	// resultPending is what becomes of a sandbox whose VM is not taken up in time.
	resultPending = "pending"
	// Pauses between attempts to take up a VM.
	firstTakeUpPause = 100 * time.Millisecond
	maxTakeUpPause   = 30 * time.Second
)

// takeUp has the driver take up the VM of a ready sandbox whose processes live,
// and tells what became of it.
//
// That the driver gets no answer before ctx ends proves nothing against the VM:
// on a host that starts anew everything is slow. So the sandbox stays ready,
// which it is as far as its containers can tell: shim and guest serve them
// without us. It is watched and can be ended by the identity of its processes;
// only what needs the VMM, a new image or a resize, is ErrUnavailable until
// another attempt succeeds. A VM that cannot be taken up for any other reason
// never will be, and is ended.
func (c *Controller) takeUp(ctx context.Context, p *pod) (string, error) {
	err := c.attach(ctx, p)
	switch {
	case err == nil:
		return "ready", nil
	case isContextError(err):
		log.G(ctx).WithError(err).Warn("cannot take up a VM in time; it runs on, and will be tried again")
		return resultPending, nil
	case errdefs.IsNotFound(err):
		return "ended", c.endAndWait(ctx, p, "the VM ended while containerd was away")
	default:
		log.G(ctx).WithError(err).Error("cannot take up a VM; it is killed")
		return "ended", c.endAndWait(ctx, p, "the VM cannot be taken up: "+err.Error())
	}
}

// keepTakingUp tries until it is known what becomes of the VM. Nothing tells when
// a VMM is able to answer, so there are pauses.
func (c *Controller) keepTakingUp(ctx context.Context, p *pod) {
	for pause := firstTakeUpPause; ; pause = min(2*pause, maxTakeUpPause) {
		timer := time.NewTimer(pause)
		select {
		case <-p.exited:
			timer.Stop()
			return
		case <-timer.C:
		}
		if p.isEnding() {
			return
		}
		ctx, cancel := context.WithTimeout(ctx, c.cfg.RecoverTimeout)
		result, err := c.takeUp(ctx, p)
		cancel()
		if err != nil {
			log.G(ctx).WithError(err).Error("cannot recover sandbox")
		}
		if result != resultPending {
			return
		}
	}
}

// attach makes the VM that is held the sandbox's. It is no error if somebody has
// begun to end the sandbox meanwhile. After an error the VM is held as before.
func (c *Controller) attach(ctx context.Context, p *pod) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-p.exited:
			cancel()
		case <-ctx.Done():
		}
	}()
	state := p.snapshot().VM
	driver := c.drivers[state.Driver]
	if driver == nil {
		return fmt.Errorf("it is %s's, which this build does not know: %w", state.Driver, errdefs.ErrNotImplemented)
	}
	var vm vmm.VM
	err := tryAtOnce(ctx, "take up a VM", func() (err error) {
		vm, err = attachTo(ctx, driver, *state)
		return err
	})
	if err != nil {
		if ctx.Err() != nil && !isContextError(err) {
			err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		p.pending = printable(err.Error(), maxCause)
		return err
	}
	return c.adopt(ctx, p, vm)
}

// attachTo has the driver take up a VM.
func attachTo(ctx context.Context, driver vmm.Driver, state vmm.State) (vmm.VM, error) {
	if err := failpoint.At(ctx, failpoint.RecoverAttach); err != nil {
		return nil, err
	}
	vm, err := driver.Attach(ctx, state)
	if err != nil {
		return nil, err
	}
	if err := failpoint.At(ctx, failpoint.RecoverAdopt); err != nil {
		return nil, errors.Join(err, vm.Close())
	}
	return vm, nil
}

// adopt gives the sandbox its VM, which is watched from now on, or lets go of it
// if the sandbox ends.
func (c *Controller) adopt(ctx context.Context, p *pod, vm vmm.VM) error {
	p.mu.Lock()
	held, s := p.held, p.shim
	ends := p.ending != nil || isClosed(p.exited)
	if !ends {
		p.vm, p.held, p.pending = vm, nil, ""
		c.watch(ctx, p, vm, s)
	}
	p.mu.Unlock()
	if ends {
		return vm.Close()
	}
	log.G(ctx).WithFields(log.Fields{"pid": vm.State().Pid, "shim": s.id.Pid}).Info("took up sandbox")
	c.enterPod(ctx, p)
	if p.snapshot().Resizing {
		go c.endResize(context.WithoutCancel(ctx), p)
	}
	// Its watcher ends.
	return held.Close()
}

// endResize gives a VM its recorded size, as containerd ended while it got another.
func (c *Controller) endResize(ctx context.Context, p *pod) {
	err := c.resize(ctx, p, func(rec *record) (sizing, vmm.Size, error) { return rec.sizing(), rec.Size, nil })
	if err != nil && !p.isEnding() {
		log.G(ctx).WithError(err).Warn("the VM is not as large as it should be since containerd ended while it was resized")
	}
}

func (p *pod) isEnding() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ending != nil
}

func (p *pod) whyPending() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.pending
}
