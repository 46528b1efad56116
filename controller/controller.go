// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package controller is a containerd sandbox controller whose sandboxes are
// virtual machines: one a pod, with the pod's network plugged in, and a shim
// process beside it that serves containerd's Task API from inside the guest.
//
// # What CRI calls, and when
//
// RunPodSandbox makes the network namespace, runs CNI, and calls Create and
// Start. It calls nothing after a Create or Start that failed, so a failed
// Start undoes Create too; after a later failure it calls Shutdown alone.
// StopPodSandbox calls Stop if the pod is ready, then removes CNI's network and
// the namespace; RemovePodSandbox does the same and calls Shutdown. When
// containerd starts, CRI calls Status and then Wait for every sandbox, one
// after the other, so Recover has found them all before the controller is CRI's.
//
// # State on disk
//
// Each sandbox has a directory, whose record says what exists beside it, or
// may exist: it is written before each side effect. So one idempotent undoing,
// by the record, serves a failed Start, Stop, Shutdown and recovery.
package controller

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sync/semaphore"

	"github.com/cloudhv/containerd-cloudhv/controller/blockdev"
	"github.com/cloudhv/containerd-cloudhv/controller/config"
	"github.com/cloudhv/containerd-cloudhv/controller/network"
	"github.com/cloudhv/containerd-cloudhv/controller/prebuild"
	"github.com/cloudhv/containerd-cloudhv/controller/rootfs"
	"github.com/cloudhv/containerd-cloudhv/vmpool"
	"github.com/cloudhv/containerd-cloudhv/vmpool/confine"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// Options are what a Controller is made of.
type Options struct {
	// Settings are the checked configuration.
	Settings *config.Settings
	// Unfit, if set, is why no sandbox can be created here: the whole reason, for people.
	Unfit error
	// Drivers are the hypervisors this build knows. Driver is the one that new
	// sandboxes use and Host what its Probe found; nil and zero if Unfit.
	Drivers []vmm.Driver
	Driver  vmm.Driver
	Host    vmm.Host
	// DriverReason says why it is that Driver, for people.
	DriverReason string
	// Sandboxes and Containers are containerd's stores.
	Sandboxes  sandbox.Store
	Containers containers.Store
	// Images makes containers' root file systems.
	Images Images
	// Network joins VMs to pod networks; without one no sandbox can start.
	Network Network
	// Layers is told what containers' writable layers take; nil if nobody asks.
	Layers *Layers
	// TTRPCAddress is containerd's socket, by which shims reach the host service.
	TTRPCAddress string
}

// Images makes the disks that containers' root file systems are made of.
type Images interface {
	// Get makes the image of a container's snapshot, or finds it, and pins it.
	Get(ctx context.Context, src rootfs.Source) (*rootfs.Image, error)
	// Pin keeps an image that a VM uses already.
	Pin(key string) *rootfs.Image
}

// Network joins a VM to a pod's network namespace.
type Network interface {
	// MakeTAP makes the TAP of a VM's built-in network device.
	MakeTAP(vmID string) (*os.File, error)
	// Read reads what CNI made; Join joins each of its interfaces to a TAP, the first
	// one to that of the VM. After an error nothing is left.
	Read(ctx context.Context, netns string) (*network.Network, error)
	Join(ctx context.Context, netns string, n *network.Network, vmID string) error
	// Listen makes the listeners of the pod's port-forwards.
	Listen(ctx context.Context, netns string) (*network.Forward, error)
	// Disconnect ends what Join began, any number of times, also in a namespace that is
	// gone. Clear undoes all, which takes longer.
	Disconnect(ctx context.Context, netns string) error
	Clear(ctx context.Context, netns string) error
}

// Controller implements sandbox.Controller. All methods may be called concurrently.
type Controller struct {
	cfg        *config.Settings
	unfit      error
	drivers    map[string]vmm.Driver
	driver     vmm.Driver
	why        string
	host       vmm.Host
	sandboxes  sandbox.Store
	containers containers.Store
	images     Images
	layers     *Layers
	network    Network
	ttrpc      string
	scratch    *scratchStore
	// blockNodes are of block devices that are being plugged in.
	blockNodes *blockdev.Nodes
	// directs is held, by sending to it, while a direct volume is plugged in.
	directs chan struct{}
	// users are those that VMMs run as; nil if they are not confined.
	users *confine.Users
	// boots are the VMs that may start at a time.
	boots *semaphore.Weighted
	// prebuild has images made before a pod asks; nil if none is.
	prebuild *prebuild.Prebuilder
	// turns are those of the sandboxes that are being started.
	turns *vmpool.Turns
	// pool has VMs ready; nil if every sandbox boots its own. poolErr is why there is
	// none that could be.
	pool    *vmpool.Pool
	poolErr error
	// closed is true when nothing is tried again any more.
	closed atomic.Bool
	// clocks ends the keeping of the guests' clocks; nil if they are not kept.
	clocks func()

	// overheads are those of RuntimeClasses that were found too small, and told.
	overheads sync.Map

	// keeping guards what is kept of damaged records.
	keeping sync.Mutex

	// mu guards pods, and nothing slow is done under it.
	mu   sync.Mutex
	pods map[string]*pod
}

var _ sandbox.Controller = (*Controller)(nil)

// errNoSettings tells of a controller without a configuration.
var errNoSettings = fmt.Errorf("no configuration: %w", errdefs.ErrFailedPrecondition)

// New returns a Controller that knows no sandbox yet; call Recover next.
func New(o Options) *Controller {
	if o.Settings == nil {
		o.Settings = &config.Settings{}
		o.Unfit = cmp.Or(o.Unfit, errNoSettings)
	}
	if o.Host.Accelerator == softwareEmulation && o.Settings.MaxMemory > maxEmulated {
		settings := *o.Settings
		settings.MaxMemory = maxEmulated
		o.Settings = &settings
	}
	c := &Controller{
		cfg:        o.Settings,
		unfit:      o.Unfit,
		drivers:    map[string]vmm.Driver{},
		driver:     o.Driver,
		why:        o.DriverReason,
		host:       o.Host,
		sandboxes:  o.Sandboxes,
		containers: o.Containers,
		images:     o.Images,
		layers:     o.Layers,
		network:    o.Network,
		ttrpc:      o.TTRPCAddress,
		scratch:    newScratchStore(o.Settings.CacheDir, o.Settings.ScratchSize),
		blockNodes: blockdev.NewNodes(filepath.Join(o.Settings.CacheDir, blockNodesDir)),
		directs:    make(chan struct{}, 1),
		boots:      semaphore.NewWeighted(bootSlots(o.Settings, o.Host)),
		turns:      vmpool.NewTurns(),
		pods:       map[string]*pod{},
	}
	if o.Settings.Confine {
		c.users = confine.NewUsers(o.Settings.VMMUsers)
	}
	for _, d := range o.Drivers {
		c.drivers[d.Name()] = d
	}
	if c.layers == nil {
		c.layers = NewLayers()
	}
	if c.network == nil {
		c.network = podNetwork{waiting: &network.Waiting{}}
	}
	if c.driver == nil && c.unfit == nil {
		c.unfit = fmt.Errorf("no hypervisor: %w", errdefs.ErrFailedPrecondition)
	}
	return c
}

// softwareEmulation is the Accelerator of a VMM that has none.
const softwareEmulation = "tcg"

// maxEmulated bounds a VM's memory in software emulation: QEMU's processors address
// 40 bits then, and on a larger host it would start no VM at all.
const maxEmulated = 768 << 30

// bootSlots is how many VMs may start at a time. A guest's boot is processor
// work from end to end: more at a time than there are processors makes each
// take longer, and in software emulation so long that they give up.
func bootSlots(s *config.Settings, host vmm.Host) int64 {
	switch {
	case s.BootParallel > 0:
		return int64(s.BootParallel)
	case host.Accelerator == softwareEmulation:
		return int64(runtime.NumCPU())
	default:
		return int64(4 * runtime.NumCPU())
	}
}

// OpenPrebuild begins to have images made before a pod asks, as the configuration
// says. The caller fills in what is containerd's. Call it after Recover.
func (c *Controller) OpenPrebuild(ctx context.Context, cfg prebuild.Config) {
	if c.unfit != nil || c.cfg.Prebuild == config.PrebuildNever {
		return
	}
	cfg.Policy, cfg.Dir, cfg.Turns = c.cfg.Prebuild, filepath.Join(c.cfg.CacheDir, "prebuild"), c.turns
	c.prebuild = prebuild.New(ctx, cfg)
}

// Close lets go of the pool's VMs, which go on, and ends what is done in the
// background.
func (c *Controller) Close() error {
	var errs []error
	c.closed.Store(true)
	if c.clocks != nil {
		c.clocks()
	}
	if c.prebuild != nil {
		errs = append(errs, c.prebuild.Close())
	}
	if c.pool != nil {
		errs = append(errs, c.pool.Close())
	}
	return errors.Join(errs...)
}

// Unfit is why this controller creates no sandboxes, or nil.
func (c *Controller) Unfit() error {
	return c.unfit
}

// podNetwork is the real Network.
type podNetwork struct{ waiting *network.Waiting }

// OpenNetwork makes the real Network, whose TAPs wait in a namespace of the state
// directory's. After an error it can only Disconnect.
func OpenNetwork(stateDir string) (Network, error) {
	w, err := network.OpenWaiting(filepath.Join(stateDir, tapNamespace))
	if err != nil {
		return podNetwork{waiting: &network.Waiting{}}, fmt.Errorf("network: %w", err)
	}
	return podNetwork{waiting: w}, nil
}

// tapNamespace is where TAPs wait; no sandbox can have this name.
const tapNamespace = ".netns"

func (n podNetwork) MakeTAP(vmID string) (*os.File, error) { return n.waiting.Make(vmID) }

func (podNetwork) Read(ctx context.Context, netns string) (*network.Network, error) {
	return network.Read(ctx, netns)
}

func (n podNetwork) Join(ctx context.Context, netns string, pod *network.Network, vmID string) error {
	return pod.Join(ctx, netns, n.waiting, vmID)
}

func (podNetwork) Listen(ctx context.Context, netns string) (*network.Forward, error) {
	return network.Listen(ctx, netns)
}

func (podNetwork) Disconnect(ctx context.Context, netns string) error {
	return network.Disconnect(ctx, netns)
}

func (podNetwork) Clear(ctx context.Context, netns string) error {
	return network.Clear(ctx, netns)
}

// confinement says by what VMMs are confined.
func (c *Controller) confinement() string {
	if c.users == nil {
		return "off"
	}
	return confine.Support()
}

// get finds a sandbox or returns ErrNotFound.
func (c *Controller) get(id string) (*pod, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p, ok := c.pods[id]; ok {
		return p, nil
	}
	return nil, fmt.Errorf("sandbox %q: %w", id, errdefs.ErrNotFound)
}

// admit makes a new sandbox known, unless its ID is taken or the node's budget has no
// room for its writable disk.
func (c *Controller) admit(p *pod) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	budget, size := c.cfg.ScratchBudget, c.cfg.ScratchSize
	_, taken := c.pods[p.id]
	if !taken && budget > 0 && int64(len(c.pods)) >= budget/size {
		return fmt.Errorf("sandbox %q: scratch_budget = %q has no room: %d sandboxes have a writable disk of scratch_size = %q each: %w",
			p.id, config.FormatSize(budget), len(c.pods), config.FormatSize(size), errdefs.ErrResourceExhausted)
	}
	return c.addLocked(p)
}

// add makes a sandbox known, unless its ID is taken.
func (c *Controller) add(p *pod) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.addLocked(p)
}

func (c *Controller) addLocked(p *pod) error {
	if _, ok := c.pods[p.id]; ok {
		return fmt.Errorf("sandbox %q: %w", p.id, errdefs.ErrAlreadyExists)
	}
	c.pods[p.id] = p
	return nil
}

// drop makes a sandbox unknown.
func (c *Controller) drop(p *pod) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pods[p.id] == p {
		delete(c.pods, p.id)
		c.layers.dropAll(p.id)
	}
}

// withPod gives a context whose log lines name the sandbox.
func withPod(ctx context.Context, id string) context.Context {
	return log.WithLogger(ctx, log.G(ctx).WithField("sandbox", id))
}

// cleanup gives a context for undoing that outlives the request which made it
// necessary, but not for long.
func (c *Controller) cleanup(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), c.cfg.CleanupTimeout+c.cfg.PowerOffTimeout)
}

// sentinel gives err an errdefs class if it has none.
func sentinel(err, class error) error {
	if err == nil || errdefs.IsNotFound(err) || errdefs.IsInvalidArgument(err) || errdefs.IsAlreadyExists(err) ||
		errdefs.IsFailedPrecondition(err) || errdefs.IsUnavailable(err) || errdefs.IsNotImplemented(err) ||
		errdefs.IsResourceExhausted(err) || errdefs.IsInternal(err) || errdefs.IsUnknown(err) ||
		errdefs.IsDeadlineExceeded(err) || errdefs.IsCanceled(err) || errdefs.IsAborted(err) {
		return err
	}
	if isContextError(err) {
		return err
	}
	return fmt.Errorf("%w: %w", err, class)
}

// isContextError is true for what fails because time was up or the caller left,
// which tells nothing about what was to be done.
func isContextError(err error) bool {
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)
}
