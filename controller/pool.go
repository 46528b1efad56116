// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cloudhv/containerd-cloudhv/controller/config"
	"github.com/cloudhv/containerd-cloudhv/controller/shim/guestspec"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
	"github.com/cloudhv/containerd-cloudhv/vmpool"
	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
	"github.com/cloudhv/containerd-cloudhv/vmpool/snapshot"
	"github.com/cloudhv/containerd-cloudhv/vmpool/sparse"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

const (
	// poolDir holds a directory for each VM of the pool, in the state directory; no
	// sandbox can have this name. poolScratch holds their disks.
	poolDir     = ".vms"
	poolScratch = "pool"
	// poolCgroup, below the configured parent, is the parent group of VMs that no pod
	// has taken.
	poolCgroup = "pool"
	// checkLimit bounds the first answer of a VM that was ready: a pod waits for it,
	// and can have another.
	checkLimit = 5 * time.Second
	// vmMemory is what a ready VM is reckoned to hold beyond the snapshot's pages,
	// in software emulation with its translated code, and with a hypervisor.
	vmMemoryTCG, vmMemory = 96 << 20, 24 << 20
)

// OpenPool makes the pool of ready VMs, which begins its work with Recover.
// Without it, or after an error, every sandbox boots a VM of its own, and what an
// earlier pool left is removed.
func (c *Controller) OpenPool() error {
	dirs := vmpool.Config{
		Off: true, Dir: filepath.Join(c.cfg.StateDir, poolDir), ScratchDir: filepath.Join(c.cfg.CacheDir, poolScratch),
		Cgroup: path.Join("/", c.cfg.CgroupParent, poolCgroup), Users: c.users,
	}
	var err error
	if c.unfit == nil && c.cfg.Pool.Restore {
		if err = c.openPool(dirs); err == nil {
			return nil
		}
	}
	var offErr error
	c.poolErr = err
	c.pool, offErr = vmpool.New(dirs)
	return errors.Join(err, offErr)
}

func (c *Controller) openPool(dirs vmpool.Config) error {
	guest, err := newGuestOfPool(c.cfg)
	if err != nil {
		return err
	}
	store, err := snapshot.Open(c.cfg.Pool.TemplateDir)
	if err != nil {
		return err
	}
	machine := vmm.Config{
		Kernel: c.cfg.Kernel, RootFS: c.cfg.Image, KernelParams: c.cfg.KernelParams, ConsoleLimit: c.cfg.ConsoleLogLimit,
		// So many vCPUs are on line in the snapshot: most pods have no CPU limit.
		Size: vmm.Size{VCPUs: c.cfg.DefaultVCPUs, MemoryBytes: c.cfg.BaseMemory},
		Max:  vmm.Size{VCPUs: c.cfg.MaxVCPUs, MemoryBytes: c.cfg.MaxMemory},
	}
	inputs, err := c.snapshotInputs(&machine)
	if err != nil {
		return err
	}
	tcg := c.host.Accelerator == softwareEmulation
	cfg := vmpool.Config{
		Driver: c.driver, Store: store, Guest: guest, Inputs: inputs, Machine: machine,
		Dir: dirs.Dir, ScratchDir: dirs.ScratchDir, Users: c.users,
		NewScratch: c.scratch.make, NewTAP: c.network.MakeTAP,
		Demand:    vmpool.Demand{Min: c.cfg.Pool.Min, Max: c.cfg.Pool.Max, Window: c.cfg.Pool.Window, Horizon: c.cfg.Pool.Horizon},
		Available: vmpool.HostMemory, ReserveMemory: c.cfg.Pool.ReserveMemory,
		MaxMemory: c.cfg.Pool.MaxMemory, VMMemory: vmMemory, Parallel: c.cfg.Pool.Parallel, Slots: c.boots, Turns: c.turns,
		Warm:          c.cfg.Pool.WarmUp == config.WarmUpAlways || c.cfg.Pool.WarmUp == config.WarmUpAuto && tcg,
		SnapshotLimit: 2 * c.cfg.BootTimeout, ReadyLimit: c.cfg.BootTimeout, CheckLimit: min(checkLimit, c.cfg.AgentTimeout),
	}
	if tcg {
		cfg.VMMemory = vmMemoryTCG
	}
	if c.cfg.Cgroup {
		cfg.Cgroup = dirs.Cgroup
	}
	if cfg.Parallel == 0 {
		cfg.Parallel = max(1, runtime.NumCPU()/2)
	}
	c.pool, err = vmpool.New(cfg)
	return err
}

// snapshotInputs hashes all that shapes a VM.
func (c *Controller) snapshotInputs(m *vmm.Config) (snapshot.Inputs, error) {
	cpu, err := snapshot.HostCPU()
	in := snapshot.Inputs{
		Driver: c.host.Driver, Version: c.host.Version, Accelerator: c.host.Accelerator, Layout: c.host.SnapshotLayout,
		KernelParams: slices.Clone(m.KernelParams), Size: m.Size, Max: m.Max, BuiltInNIC: true, ScratchBytes: c.cfg.ScratchSize, CPU: cpu,
	}
	for _, f := range []struct {
		to   *string
		path string
	}{{&in.Binary, c.host.Binary}, {&in.Kernel, m.Kernel}, {&in.RootFS, m.RootFS}} {
		sum, hashErr := sparse.Hash(f.path)
		*f.to, err = sum, errors.Join(err, hashErr)
	}
	return in, err
}

// guestOfPool is what the pool asks of a guest.
type guestOfPool struct {
	cfg *config.Settings
	// spec is the throw-away container's.
	spec []byte
}

func newGuestOfPool(cfg *config.Settings) (*guestOfPool, error) {
	spec, err := warmUpSpec()
	if err != nil {
		return nil, fmt.Errorf("the warm-up's container: %w", err)
	}
	return &guestOfPool{cfg: cfg, spec: spec}, nil
}

// warmUpSpec is like what CRI makes for a container without wishes, so that the
// guest does for it what it does for a pod's, and compiles the seccomp profile
// that pods have.
func warmUpSpec() ([]byte, error) {
	ctx := namespaces.WithNamespace(context.Background(), "cloudhv")
	spec, err := oci.GenerateSpec(ctx, nil, &containers.Container{ID: "warm-up"}, oci.WithProcessArgs("true"), oci.WithNewPrivileges)
	if err != nil {
		return nil, err
	}
	spec.Linux.Seccomp = seccomp.DefaultProfile(spec)
	spec.Version = guestspec.OCIVersion
	return json.Marshal(spec)
}

// Ready waits until the agent answers.
func (g *guestOfPool) Ready(ctx context.Context, vm vmm.VM) error {
	_, err := guestOf(ctx, vm, g.cfg.BootTimeout)
	if err != nil {
		tellSilent(ctx, vm)
	}
	return err
}

// warmUpDisk is the serial of the throw-away container's image.
const warmUpDisk = "warm-up"

// WarmUp goes through what every pod goes through: the configuration of its VM, which
// is undone, and a container on a disk that is plugged in and taken away again.
func (g *guestOfPool) WarmUp(ctx context.Context, vm vmm.VM) error {
	_, err := callGuest(ctx, vm, g.cfg.BootTimeout, func(ctx context.Context, m guestv1.MachineService) (*guestv1.ConfigureResponse, error) {
		return m.Rehearse(ctx, rehearsal())
	})
	if err != nil {
		return err
	}
	_, err = callGuest(ctx, vm, g.cfg.BootTimeout, func(ctx context.Context, m guestv1.MachineService) (*guestv1.SyncClockResponse, error) {
		return m.SyncClock(ctx, &guestv1.SyncClockRequest{})
	})
	if err != nil {
		return err
	}
	serial, err := vm.AddDisk(ctx, vmm.Disk{Serial: warmUpDisk, Path: g.cfg.Image, ReadOnly: true})
	if err != nil {
		return err
	}
	_, err = callTasks(ctx, vm, g.cfg.BootTimeout, func(ctx context.Context, t guestv1.TaskService) (*emptypb.Empty, error) {
		return t.WarmUp(ctx, &guestv1.WarmUpRequest{Spec: g.spec, ImageSerial: serial})
	})
	if err != nil {
		return err
	}
	return vm.RemoveDisk(ctx, warmUpDisk)
}

// rehearsal is like what a pod with a network of both families is configured with.
// Its names and addresses are those kept for documentation.
func rehearsal() *guestv1.ConfigureRequest {
	return &guestv1.ConfigureRequest{
		PodId: "rehearsal", Hostname: "rehearsal", ResolvConf: []byte("nameserver 192.0.2.1\n"),
		Clock: timestamppb.Now(), Entropy: make([]byte, entropyBytes), Vcpus: 1, MachineId: machineID("rehearsal"),
		BuiltInMac: vmm.BuiltInMAC,
		Interfaces: []*guestv1.Interface{{
			Name: "eth0", Mac: "02:00:5e:00:53:01", Mtu: 1500, Addresses: []string{"192.0.2.2/24", "2001:db8::2/64"},
		}},
		Routes: []*guestv1.Route{
			{Device: "eth0", Destination: "192.0.2.0/24", Family: unix.AF_INET, Scope: unix.RT_SCOPE_LINK, Protocol: unix.RTPROT_KERNEL},
			{Device: "eth0", Destination: "2001:db8::/64", Family: unix.AF_INET6, Priority: 256, Protocol: unix.RTPROT_KERNEL},
			{Device: "eth0", Gateway: "192.0.2.1", Family: unix.AF_INET},
			{Device: "eth0", Gateway: "2001:db8::1", Family: unix.AF_INET6},
		},
	}
}

// acquire takes a VM from the pool for a sandbox, whose record then names it. It
// returns false if one must be booted.
func (c *Controller) acquire(ctx context.Context, p *pod, watch *stopwatch) (bool, error) {
	if c.pool == nil || p.start.ownBoot {
		return false, nil
	}
	var vm *vmpool.VM
	var info *guestv1.InfoResponse
	err := watch.time(ctx, "acquire", func(ctx context.Context) (err error) {
		vm, err = c.pool.Acquire(ctx, vmpool.Request{
			Owner: p.id, Cgroup: p.snapshot().Cgroup,
			Check: func(ctx context.Context, vm vmm.VM) (err error) {
				began := time.Now()
				info, err = guestOf(ctx, vm, c.cfg.AgentTimeout)
				watch.past(checkPhase, began)
				return err
			},
		})
		return err
	})
	if errors.Is(err, vmpool.ErrNone) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	err = p.update(ctx, failpoint.StartAcquired, func(r *record) {
		r.VM, r.Scratch, r.Outcome, r.Snapshot = stateOf(vm), vm.Scratch, string(vm.Outcome), vm.Key()
		if info != nil {
			r.Guest = guestOfInfo(info)
		}
	})
	if err != nil {
		vm.Settled()
		ctx, cancel := c.cleanup(ctx)
		defer cancel()
		return false, errors.Join(err, c.pool.Discard(ctx, vm))
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.vm = vm
	return true, nil
}

// settle tells the pool that a sandbox's VM is through what costs a processor.
func settle(p *pod) {
	if vm, ok := p.handle().(*vmpool.VM); ok {
		vm.Settled()
	}
}

// report tells the pool whether a guest that was restored has answered; err is
// why it has not.
func (c *Controller) report(ctx context.Context, vm vmm.VM, err error) {
	if vm, ok := vm.(*vmpool.VM); ok {
		c.pool.Report(ctx, vm, err)
	}
}

// takeTurn holds back what is done in the background, the pool's refill for one,
// while a sandbox starts, and for as long after as its first container may take.
func (c *Controller) takeTurn() (release func()) {
	done := c.turns.Begin()
	return func() { time.AfterFunc(startGrace, done) }
}

// startGrace is about what CRI takes from RunPodSandbox's answer to a container's
// first instruction.
const startGrace = time.Second

// forgetVM removes what the pool knows of a sandbox's VM that has ended.
func (c *Controller) forgetVM(ctx context.Context, rec *record) error {
	if c.pool == nil {
		return nil
	}
	return c.pool.Forget(ctx, rec.VM)
}

// recoverPool takes up the pool's VMs, once those of sandboxes are known. VMMs that
// were started and not recorded are killed.
func (c *Controller) recoverPool(ctx context.Context) error {
	if c.pool == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, c.cfg.RecoverTimeout)
	defer cancel()
	if err := failpoint.At(ctx, failpoint.RecoverPool); err != nil {
		return err
	}
	if unrecorded := c.pool.Unrecorded(); len(unrecorded) > 0 {
		c.killStrays(ctx, unrecorded...)
	}
	owned := map[string]bool{}
	for _, p := range c.allPods() {
		if rec := p.snapshot(); rec.VM != nil {
			owned[rec.VM.Dir] = true
		}
	}
	return c.pool.Recover(ctx, func(dir string) bool { return owned[dir] })
}

// PoolStatus tells how the pool is; false if there is none.
func (c *Controller) PoolStatus() (vmpool.Status, bool) {
	if c.pool == nil {
		return vmpool.Status{}, false
	}
	return c.pool.Status(), true
}
