// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sync/errgroup"

	"github.com/cloudhv/containerd-cloudhv/controller/network"
	shimapi "github.com/cloudhv/containerd-cloudhv/controller/shim"
	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// errStopped is why a Start ends when Stop or Shutdown is called meanwhile.
var errStopped = fmt.Errorf("the sandbox was stopped while it started: %w", errdefs.ErrAborted)

// Start gives the sandbox its VM, network and shim. If that fails everything is
// undone, Create too. On a sandbox that is ready it answers as the first time.
func (c *Controller) Start(ctx context.Context, id string) (_ sandbox.ControllerInstance, retErr error) {
	ctx = withPod(ctx, id)
	p, err := c.get(id)
	if err != nil {
		return sandbox.ControllerInstance{}, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	mine, err := p.beginStart(ctx, cancel)
	if !mine {
		if err != nil {
			return sandbox.ControllerInstance{}, err
		}
		return c.joinStart(ctx, p)
	}
	// Last, as whoever ends the sandbox waits for it.
	defer close(p.started)
	ctx, watch := begin(ctx, startVerb, id)
	defer func() {
		rec := p.snapshot()
		countStart(&rec, watch, retErr)
		if retErr != nil {
			retErr = c.undoStart(ctx, p, retErr)
		}
		watch.end(ctx, retErr)
	}()
	if err != nil {
		return sandbox.ControllerInstance{}, err
	}
	if err := c.bringUp(ctx, p, watch); err != nil {
		if cause := context.Cause(ctx); errors.Is(cause, errStopped) {
			err = cause
		}
		return sandbox.ControllerInstance{}, sentinel(err, errdefs.ErrUnknown)
	}
	if err := c.becomeReady(ctx, p, watch); err != nil {
		return sandbox.ControllerInstance{}, err
	}
	if err := failpoint.At(ctx, failpoint.StartDone); err != nil {
		return sandbox.ControllerInstance{}, err
	}
	c.enterPod(ctx, p)
	return p.instance(), nil
}

// beginStart makes the sandbox starting. It returns false if another Start
// runs or has succeeded, and for a sandbox that cannot be started. With true the
// caller has a Start to undo, also after an error.
func (p *pod) beginStart(ctx context.Context, cancel context.CancelCauseFunc) (bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch s := p.rec.State; {
	case p.removed:
		return false, fmt.Errorf("sandbox %q: %w", p.id, errdefs.ErrNotFound)
	case p.ending != nil:
		return false, fmt.Errorf("sandbox %q is being stopped, or was: %w", p.id, errdefs.ErrFailedPrecondition)
	case p.cancelStart != nil || s == StateReady:
		return false, nil
	case s.to(StateStarting) != nil:
		return false, fmt.Errorf("sandbox %q: %w", p.id, s.to(StateStarting))
	}
	p.cancelStart = cancel
	return true, p.updateLocked(ctx, failpoint.StartRecord, func(r *record) { r.State = StateStarting })
}

// joinStart waits for another Start and answers as that does.
func (c *Controller) joinStart(ctx context.Context, p *pod) (sandbox.ControllerInstance, error) {
	select {
	case <-p.started:
	case <-ctx.Done():
		return sandbox.ControllerInstance{}, context.Cause(ctx)
	}
	rec := p.snapshot()
	if err := rec.ready(); err != nil {
		return sandbox.ControllerInstance{}, err
	}
	return p.instance(), nil
}

// instance is what Start answers for a sandbox that is ready.
func (p *pod) instance() sandbox.ControllerInstance {
	rec := p.snapshot()
	return sandbox.ControllerInstance{
		SandboxID: p.id,
		Pid:       vmmPid(&rec),
		CreatedAt: rec.CreatedAt,
		Address:   taskAddress(p),
		Version:   taskAPIVersion,
		Labels:    map[string]string{"oci_runtime_type": runtimeType},
	}
}

// runtimeType is our runtime's name in CRI's configuration and metrics.
const runtimeType = "io.containerd.cloudhv.v1"

func vmmPid(rec *record) uint32 {
	if rec.VM == nil {
		return 0
	}
	return uint32(rec.VM.Pid)
}

// bringUp makes all that a ready sandbox has. What the VM does not need yet is
// made while it boots.
func (c *Controller) bringUp(ctx context.Context, p *pod, watch *stopwatch) error {
	n := &network.Network{}
	defer func() {
		// The VMM has its own files by now, or there is none.
		if err := n.Close(); err != nil {
			log.G(ctx).WithError(err).Warn("cannot close a tap")
		}
	}()
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		return watch.time(gctx, "network", func(ctx context.Context) (err error) {
			n, err = c.readNetwork(ctx, p)
			return err
		})
	})
	defer c.takeTurn()()
	booted := func() {}
	g.Go(func() error {
		acquired, err := c.acquire(gctx, p, watch)
		if err == nil && !acquired {
			booted, err = c.boot(gctx, p, watch)
		}
		return err
	})
	err := g.Wait()
	defer func() {
		booted()
		settle(p)
	}()
	if err != nil {
		return err
	}
	return c.fitOut(ctx, p, n, watch)
}

// fitOut makes a VM this pod's: on the host's side and, at the same time, in the guest.
func (c *Controller) fitOut(ctx context.Context, p *pod, n *network.Network, watch *stopwatch) error {
	vm := p.handle()
	g, gctx := errgroup.WithContext(ctx)
	part := func(name string, do func(ctx context.Context) error) {
		g.Go(func() error { return watch.time(gctx, name, do) })
	}
	part("shim", func(ctx context.Context) error { return c.launchShim(ctx, p, vm) })
	part("join", func(ctx context.Context) error { return c.joinNetwork(ctx, p, vm, n) })
	g.Go(func() error { return c.prepareGuest(gctx, p, vm, n, watch) })
	if err := g.Wait(); err != nil {
		return err
	}
	return p.update(ctx, failpoint.StartVMRecord, func(r *record) { r.VM = stateOf(vm) })
}

// handle is the VM, nil before it boots.
func (p *pod) handle() vmm.VM {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.vm
}

// readNetwork reads what CNI made for the pod, in the namespace that the record
// names.
func (c *Controller) readNetwork(ctx context.Context, p *pod) (*network.Network, error) {
	netns := p.snapshot().NetNS
	if netns == "" {
		return &network.Network{}, nil // loopback only
	}
	n, err := c.network.Read(ctx, netns)
	if err != nil {
		return &network.Network{}, fmt.Errorf("pod network: %w", err)
	}
	if len(n.Firewalls) > 0 {
		log.G(ctx).WithField("tables", n.Firewalls).Warn("firewall rules that CNI made in the pod's network namespace do nothing to its VM")
	}
	return n, nil
}

// joinNetwork joins the pod's network to the VM, and plugs in the devices that the VM
// does not have yet.
func (c *Controller) joinNetwork(ctx context.Context, p *pod, vm vmm.VM, n *network.Network) error {
	if len(n.Interfaces) > 0 {
		if err := failpoint.At(ctx, failpoint.StartJoin); err != nil {
			return err
		}
		if err := c.network.Join(ctx, p.snapshot().NetNS, n, vm.ID()); err != nil {
			return fmt.Errorf("pod network: %w", err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, c.cfg.HotPlugTimeout)
	defer cancel()
	for _, nic := range n.NICs {
		if err := failpoint.At(ctx, failpoint.StartNIC); err != nil {
			return err
		}
		if err := vm.AddNIC(ctx, nic); err != nil {
			return fmt.Errorf("plug in network interface %s: %w", nic.ID, err)
		}
	}
	return nil
}

// boot makes the scratch disk and starts the VM, whose record names both. It waits
// for its turn, which the caller ends by calling booted, after an error too.
func (c *Controller) boot(ctx context.Context, p *pod, watch *stopwatch) (booted func(), _ error) {
	err := watch.time(ctx, "queue", func(ctx context.Context) error { return c.boots.Acquire(ctx, 1) })
	if err != nil {
		return func() {}, fmt.Errorf("wait for other VMs to start: %w", err)
	}
	booted = func() { c.boots.Release(1) }
	uid, err := c.users.Take(p.id)
	if err != nil {
		return booted, fmt.Errorf("start the VM: %w", err)
	}
	if err := p.update(ctx, failpoint.BootUser, func(r *record) { r.UID = uid }); err != nil {
		return booted, err
	}
	rec := p.snapshot()
	err = watch.time(ctx, "scratch", func(ctx context.Context) error { return c.makeScratch(ctx, rec.Scratch) })
	if err != nil {
		return booted, err
	}
	return booted, watch.time(ctx, "boot", func(ctx context.Context) error { return c.bootNow(ctx, p, &rec) })
}

// makeScratch makes a sandbox's writable disk.
func (c *Controller) makeScratch(ctx context.Context, path string) error {
	if err := failpoint.At(ctx, failpoint.BootScratch); err != nil {
		return err
	}
	return c.scratch.make(ctx, path)
}

// bootNow starts the VM, with its TAP.
func (c *Controller) bootNow(ctx context.Context, p *pod, rec *record) error {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.BootTimeout)
	defer cancel()
	if err := failpoint.At(ctx, failpoint.BootTAP); err != nil {
		return err
	}
	tap, err := c.network.MakeTAP(p.id)
	if err != nil {
		return fmt.Errorf("start the VM: %w", err)
	}
	defer tap.Close() //nolint:errcheck // the VMM has its own
	cfg := c.vmConfig(p, rec)
	cfg.TAP = tap
	if err := failpoint.At(ctx, failpoint.BootVMM); err != nil {
		return err
	}
	vm, err := c.driver.Boot(ctx, cfg)
	if err != nil {
		return fmt.Errorf("start the VM: %w", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.vm = vm
	return p.updateLocked(ctx, failpoint.BootRecord, func(r *record) { r.VM = stateOf(vm) })
}

// vmConfig is that of a VM that is booted for the sandbox. It has no virtio-mem if
// all the memory that it may have is there from the start.
func (c *Controller) vmConfig(p *pod, rec *record) vmm.Config {
	params := append([]string{}, c.cfg.KernelParams...)
	size := vmm.Size{VCPUs: rec.Size.VCPUs, MemoryBytes: c.cfg.BaseMemory}
	if rec.sizing().FixedMemory != "" {
		size.MemoryBytes = rec.Size.MemoryBytes
	}
	return vmm.Config{
		ID:           p.id,
		Dir:          p.dir,
		Kernel:       c.cfg.Kernel,
		RootFS:       c.cfg.Image,
		KernelParams: append(params, p.start.kernelParams...),
		Scratch:      rec.Scratch,
		Size:         size,
		Max:          rec.Max,
		ConsoleLimit: c.cfg.ConsoleLogLimit,
		CgroupPath:   rec.Cgroup,
		UID:          rec.UID,
	}
}

func stateOf(vm vmm.VM) *vmm.State {
	s := vm.State()
	return &s
}

// launchShim starts the pod's shim while the guest boots.
func (c *Controller) launchShim(ctx context.Context, p *pod, vm vmm.VM) error {
	program, err := shimBinary(c.cfg.Shim)
	if err != nil {
		return err
	}
	rec := p.snapshot()
	forward := c.listenForForwards(ctx, rec.NetNS)
	defer forward.Close() //nolint:errcheck // the shim has its own
	s, err := startShim(ctx, p, program, shimapi.Config{
		SandboxID:     p.id,
		Namespace:     rec.Namespace,
		SandboxPid:    vmmPid(&rec),
		GuestEndpoint: vm.PodEndpoint(),
		TTRPCAddress:  c.ttrpc,
		PodUID:        rec.Pod.UID,
		DirectVolumes: rec.Direct,
		Debug:         c.cfg.Debug,
	}, forward.Listeners)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.shim = s
	return p.updateLocked(ctx, failpoint.StartShimRecord, func(r *record) { r.Shim = &s.id })
}

// listenForForwards makes the near end of the pod's port-forwards. A pod whose host
// cannot have it runs without.
func (c *Controller) listenForForwards(ctx context.Context, netns string) *network.Forward {
	if netns == "" {
		return &network.Forward{}
	}
	err := failpoint.At(ctx, failpoint.StartForwards)
	var forward *network.Forward
	if err == nil {
		forward, err = c.network.Listen(ctx, netns)
	}
	if err != nil {
		log.G(ctx).WithError(err).Warn("port-forward to this pod is not possible")
		return &network.Forward{}
	}
	return forward
}

// prepareGuest waits for the guest, makes its VM as large as the pod, and configures it.
func (c *Controller) prepareGuest(ctx context.Context, p *pod, vm vmm.VM, n *network.Network, watch *stopwatch) error {
	var guest guestInfo
	err := watch.time(ctx, "guest", func(ctx context.Context) (err error) {
		if err := failpoint.At(ctx, failpoint.StartGuest); err != nil {
			return err
		}
		guest, err = c.waitForGuest(ctx, p, vm, watch)
		return err
	})
	if err != nil {
		return err
	}
	if err := p.update(ctx, failpoint.StartGuestRecord, func(r *record) { r.Guest = guest }); err != nil {
		return err
	}
	rec := p.snapshot()
	err = watch.time(ctx, "resize", func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, c.cfg.HotPlugTimeout)
		defer cancel()
		if err := failpoint.At(ctx, failpoint.StartResize); err != nil {
			return err
		}
		if err := vm.Resize(ctx, rec.Size); err != nil {
			return fmt.Errorf("make the VM as large as the pod: %w", err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return watch.time(ctx, "configure", func(ctx context.Context) error {
		req, err := configureRequest(&rec, p.start, n)
		if err != nil {
			return err
		}
		if err := failpoint.At(ctx, failpoint.StartConfigure); err != nil {
			return err
		}
		return c.configureGuest(ctx, vm, req, watch)
	})
}

// becomeReady records the sandbox as ready and watches over it from now on.
func (c *Controller) becomeReady(ctx context.Context, p *pod, watch *stopwatch) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	vm, s := p.vm, p.shim
	err := p.updateLocked(ctx, failpoint.StartReady, func(r *record) {
		r.State = StateReady
		r.VM = stateOf(vm)
		r.Phases = watch.list()
	})
	if err != nil {
		return err
	}
	p.cancelStart = nil
	c.watch(ctx, p, vm, s)
	log.G(ctx).WithFields(log.Fields{
		"pid": vm.State().Pid, "shim": s.id.Pid, "outcome": p.rec.outcome(),
		"total": time.Since(watch.start).Round(100 * time.Microsecond), "phases": phasesText(p.rec.Phases),
	}).Info("started sandbox")
	return nil
}

// endAgain ends and removes a sandbox of which something was left.
func (c *Controller) endAgain(ctx context.Context, p *pod, why endReason) error {
	e := c.end(ctx, p, why)
	select {
	case <-e.done:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if e.err != nil {
		return e.err
	}
	return c.remove(ctx, p)
}

// undoStart removes all that a failed Start and its Create made, and returns
// why the Start failed together with what could not be undone.
func (c *Controller) undoStart(ctx context.Context, p *pod, why error) error {
	reason := endReason{cause: "start failed: " + why.Error(), label: "start", status: exitKilled}
	err := c.endStart(ctx, p, reason)
	if err == nil {
		err = c.remove(ctx, p)
	}
	if err != nil {
		// CRI takes the sandbox for gone, and asks for its end no more.
		c.keepTrying(ctx, "end a sandbox whose start has failed", c.cfg.CleanupTimeout+c.cfg.PowerOffTimeout, func(ctx context.Context) error {
			return c.endAgain(ctx, p, reason)
		})
	}
	return errors.Join(why, err)
}
