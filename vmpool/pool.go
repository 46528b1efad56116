// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package vmpool has VMs ready before they are asked for. A VM is restored
// copy-on-write from a base snapshot, made warm, and kept until a pod takes it;
// it serves that pod and no other. When none is ready one is restored while the
// pod waits (a miss). Where there is no snapshot that can be used the pool gives
// none, and the caller boots one (cold).
//
// Every VM has a directory below Config.Dir with its sockets, logs and a record,
// and a writable disk below Config.ScratchDir. The record is written before each
// step it describes, so that whatever process comes next can use the VM or remove
// it without a trace.
package vmpool

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/pkg/tracing"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sync/semaphore"

	"github.com/cloudhv/containerd-cloudhv/vmpool/confine"
	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
	"github.com/cloudhv/containerd-cloudhv/vmpool/snapshot"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// Outcome tells how Acquire came by a VM.
type Outcome string

// What Acquire counts.
const (
	Hit  Outcome = "hit"  // it was ready
	Miss Outcome = "miss" // it was restored
	Cold Outcome = "cold" // the caller had to boot one
	// Failed is that of an Acquire whose caller left, or has waited too long.
	Failed Outcome = "failed"
)

// ErrNone means that the pool has no VM and cannot restore one: boot it.
var ErrNone = fmt.Errorf("the pool has no VM to give: %w", errdefs.ErrUnavailable)

// Guest is what the pool asks of a VM's agent.
type Guest interface {
	// Ready returns when the agent answers, and is of the right version.
	Ready(ctx context.Context, vm vmm.VM) error
	// WarmUp makes the guest run what every pod runs, so that a pod finds it done.
	WarmUp(ctx context.Context, vm vmm.VM) error
}

// Config is what a Pool is made of. Sizes are in bytes.
type Config struct {
	// Off makes a pool that has nothing to give, and only removes what an earlier
	// process left: Dir, ScratchDir and Cgroup are all that it needs.
	Off    bool
	Driver vmm.Driver
	Store  *snapshot.Store
	Guest  Guest
	// Inputs describe the snapshot that the pool restores.
	Inputs snapshot.Inputs
	// Machine is what every VM is booted with: kernel, image, parameters, size.
	// Its ID, Dir, Scratch, MemoryFile and CgroupPath are the pool's to fill in.
	Machine vmm.Config
	// Dir holds a directory for each VM, ScratchDir their disks.
	Dir, ScratchDir string
	// NewScratch makes an empty disk at path, for a template.
	NewScratch func(ctx context.Context, path string) error
	// NewTAP makes the TAP of a VM's built-in network device, for its ID; nil for VMs
	// without one.
	NewTAP func(vmID string) (*os.File, error)
	// Cgroup is the parent group of VMs that no pod has taken; empty for none.
	Cgroup string
	// Users are those that VMMs run as; nil for VMMs that are not confined. They are the
	// caller's, who may give some to VMs of his own.
	Users *confine.Users

	// Demand sizes the pool; its Max is 0 for a pool that only restores.
	Demand Demand
	// MaxMemory bounds what ready VMs may hold together, at VMMemory each.
	MaxMemory, VMMemory int64
	// Available tells what memory the host has left, of which ReserveMemory is not
	// the pool's; nil for a host that has always enough.
	Available     func() (int64, error)
	ReserveMemory int64
	// Parallel is how many VMs are made ready at a time.
	Parallel int
	// Turns are those of the pods that are being started; nil means the pool's own.
	Turns *Turns
	// Slots bound the VMs that are restored while a pod waits; nil means no bound.
	Slots *semaphore.Weighted
	// Warm says whether a VM is made warm before it is ready.
	Warm bool
	// SnapshotLimit, ReadyLimit and CheckLimit bound the making of a snapshot, the
	// making of a ready VM, and the check of one that is handed out.
	SnapshotLimit, ReadyLimit, CheckLimit time.Duration
}

// Pool keeps VMs ready. Its methods may be called concurrently.
type Pool struct {
	cfg Config
	key string

	wake   chan struct{}
	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu    sync.Mutex
	ready []*VM // the one that became ready first is taken first
	// making counts those that are being made ready, ending those that are let go.
	making, ending int
	arrivals       []time.Time
	// asked are what people asked for, as if so many pods had come.
	asked []time.Time
	// current is the snapshot that VMs are made from.
	current string
	// failures counts what the refill failed to do without success between, and
	// until is the end of the pause that it costs.
	failures int
	until    time.Time
	// badRestores are the restores that failed one after the other.
	badRestores int
	lastErr     error
	drained     bool
	// pressure and available are what the last look at the host's memory found.
	pressure  pressure
	available int64
	outcomes  map[Outcome]int
	outran    int
	// changed is closed, and replaced, when something of this has changed.
	changed chan struct{}
}

// VM is one that the pool made. Its owner ends it with Discard.
type VM struct {
	vmm.VM
	// Outcome is how Acquire came by it.
	Outcome Outcome
	// Scratch is its writable disk, Dir its directory.
	Scratch, Dir string
	// Made is when it began to be made.
	Made time.Time

	rec record
	// settled gives back the place of a restore.
	settled func()
	// taken is closed when the VM leaves the ready ones.
	taken chan struct{}
}

// Settled lets the next VM be restored: this one is through what costs a
// processor. Call it in any case; it can be repeated.
func (vm *VM) Settled() {
	if vm.settled != nil {
		vm.settled()
	}
}

// Key is the ID of the snapshot it was restored from.
func (vm *VM) Key() string { return vm.rec.Key }

// Request is what a pod wants.
type Request struct {
	// Owner is the pod.
	Owner string
	// Cgroup is the pod's, for a VM that is made now. One that was ready moves there
	// later: see vmm.VM.SetCgroup.
	Cgroup string
	// Check, if set, decides whether a VM that was ready is fit to be handed out: it
	// asks the guest's agent something.
	Check func(ctx context.Context, vm vmm.VM) error
}

// New makes a pool that does nothing yet: call Recover, then Run.
func New(cfg Config) (*Pool, error) {
	for _, dir := range []string{cfg.Dir, cfg.ScratchDir} {
		// A VMM that is no root goes through it to what is its own.
		err := os.MkdirAll(dir, 0o711)
		if err == nil {
			err = os.Chmod(dir, 0o711)
		}
		if err != nil {
			return nil, fmt.Errorf("pool: %w", err)
		}
	}
	if cfg.Turns == nil {
		cfg.Turns = NewTurns()
	}
	ctx, cancel := context.WithCancel(context.Background())
	p := &Pool{
		cfg: cfg, key: cfg.Inputs.Key(), wake: make(chan struct{}, 1),
		ctx: ctx, cancel: cancel, outcomes: map[Outcome]int{}, changed: make(chan struct{}),
	}
	return p, nil
}

// Acquire gives a pod its VM, or returns ErrNone. After an error nothing is left.
// A VM that was ready has passed the check; in another the guest runs, but need
// not have answered.
func (p *Pool) Acquire(ctx context.Context, req Request) (got *VM, retErr error) {
	if p.cfg.Off || p.ctx.Err() != nil {
		return nil, fmt.Errorf("%w: it is off", ErrNone)
	}
	ctx, span := tracing.StartSpan(ctx, tracing.Name(spanPrefix, "acquire"))
	defer func() { endAcquire(span, got, retErr) }()
	wanted, done := p.begin()
	defer done()
	ready := p.take()
	if ready == nil && wanted {
		p.outrun()
	}
	if ready != nil {
		err := step(ctx, "hand_over", func(ctx context.Context) error { return p.handOver(ctx, ready, req) })
		if err == nil {
			return p.counted(ready, nil)
		}
		// The next one may be no better: the pod does not try them all.
		p.wg.Go(func() { p.discardBad(ctx, ready, err) })
		if ctx.Err() != nil {
			return p.counted(nil, fmt.Errorf("acquire a VM: %w", context.Cause(ctx)))
		}
	}
	snap, err := p.cfg.Store.Peek(p.key)
	if err != nil {
		p.poke()
		return p.counted(nil, fmt.Errorf("%w: %w", ErrNone, err))
	}
	if p.cfg.Slots != nil {
		if err := p.cfg.Slots.Acquire(ctx, 1); err != nil {
			return p.counted(nil, fmt.Errorf("wait for other VMs to be restored: %w", err))
		}
	}
	settled := sync.OnceFunc(func() {
		if p.cfg.Slots != nil {
			p.cfg.Slots.Release(1)
		}
	})
	vm, err := p.restoreFor(ctx, snap, req)
	if err != nil {
		settled()
		if ctx.Err() == nil {
			log.G(ctx).WithError(err).Warn("a VM cannot be restored; the pod's is booted")
			err = fmt.Errorf("%w: %w", ErrNone, err)
		}
		return p.counted(nil, err)
	}
	vm.settled = settled
	return p.counted(vm, nil)
}

// restoreFor restores a VM for a pod, which is left time to boot one if that hangs.
func (p *Pool) restoreFor(ctx context.Context, snap *snapshot.Snapshot, req Request) (*VM, error) {
	within, cancel := context.WithTimeout(ctx, p.cfg.ReadyLimit/restoreShare)
	defer cancel()
	vm, err := p.restore(within, snap, req)
	if err != nil && ctx.Err() == nil && within.Err() != nil {
		p.blame(ctx, snap.Key, err)
	}
	return vm, err
}

// restoreShare is the part of the time to make a VM ready that its restore may take
// while a pod waits.
const restoreShare = 3

// begin notes that a pod came, and holds the refill back until done is called. It tells
// whether there were to be VMs ready for it.
func (p *Pool) begin() (wanted bool, done func()) {
	p.mu.Lock()
	now := time.Now()
	wanted = p.target() > 0
	p.arrivals = p.cfg.Demand.Forget(append(p.arrivals, now), now)
	p.mu.Unlock()
	end := p.cfg.Turns.Begin()
	return wanted, func() {
		end()
		p.poke()
	}
}

// outrun notes that the pool did not have what it was to have.
func (p *Pool) outrun() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.outran++
	drainedCounter.Inc()
}

// poke makes Run look again.
func (p *Pool) poke() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// outcomeOf tells how an Acquire ended.
func outcomeOf(vm *VM, err error) Outcome {
	switch {
	case err == nil:
		return vm.Outcome
	case errors.Is(err, ErrNone):
		return Cold
	default:
		return Failed
	}
}

func (p *Pool) counted(vm *VM, err error) (*VM, error) {
	outcome := outcomeOf(vm, err)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.outcomes[outcome]++
	acquireCounter.WithValues(string(outcome)).Inc()
	if err != nil {
		return nil, err
	}
	return vm, nil
}

// take takes the oldest ready VM out of the pool, of the current snapshot if there
// is one; and none if that snapshot was changed.
func (p *Pool) take() *VM {
	if _, err := p.cfg.Store.Peek(p.key); errdefs.IsDataLoss(err) {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.ready) > 0 && p.ctx.Err() == nil {
		vm := p.pull(max(0, slices.IndexFunc(p.ready, p.isCurrent)))
		if !isClosed(vm.Done()) {
			return vm
		}
		p.letGo(vm)
	}
	return nil
}

// isCurrent is true for a VM of the snapshot in use, under p.mu.
func (p *Pool) isCurrent(vm *VM) bool { return vm.rec.Key == p.current }

// pull takes a VM out of the ready ones, under p.mu.
func (p *Pool) pull(i int) *VM {
	vm := p.ready[i]
	p.ready = slices.Delete(p.ready, i, i+1)
	close(vm.taken)
	p.notify()
	return vm
}

// handOver gives a ready VM to a pod, if its agent answers.
func (p *Pool) handOver(ctx context.Context, vm *VM, req Request) error {
	ctx, cancel := context.WithTimeout(ctx, p.cfg.CheckLimit)
	defer cancel()
	vm.rec.Owner = req.Owner
	if err := vm.save(ctx, failpoint.HandoverRecord); err != nil {
		return err
	}
	if err := failpoint.At(ctx, failpoint.HandoverResume); err != nil {
		return err
	}
	if err := vm.Resume(ctx); err != nil {
		return fmt.Errorf("VM %s does not go on: %w", vm.ID(), err)
	}
	if err := failpoint.At(ctx, failpoint.HandoverCheck); err != nil {
		return err
	}
	if req.Check != nil {
		if err := req.Check(ctx, vm); err != nil {
			return fmt.Errorf("VM %s: %w", vm.ID(), err)
		}
	}
	vm.Outcome = Hit
	return failpoint.At(ctx, failpoint.HandoverDone)
}

// discardBad removes a VM that was ready and cannot be used.
func (p *Pool) discardBad(ctx context.Context, vm *VM, why error) {
	log.G(ctx).WithError(why).WithField("vm", vm.ID()).Warn("a ready VM cannot be used; it is ended")
	badCounter.Inc()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), discardLimit)
	defer cancel()
	if err := p.discardSurely(ctx, vm); err != nil {
		log.G(ctx).WithError(err).WithField("vm", vm.ID()).Error("cannot end a VM")
	}
}

// discardLimit bounds the ending of a VM.
const discardLimit = 20 * time.Second

// Discard ends a VM and removes all that it has. It can be repeated.
func (p *Pool) Discard(ctx context.Context, vm *VM) error {
	if err := failpoint.At(ctx, failpoint.DiscardKill); err != nil {
		return err
	}
	if err := vm.Kill(ctx); err != nil {
		return fmt.Errorf("end VM %s: %w", vm.ID(), err) // it stays under control
	}
	if err := vm.Close(); err != nil {
		return fmt.Errorf("end VM %s: %w", vm.ID(), err)
	}
	return p.remove(ctx, &vm.rec, vm.Dir)
}

// Forget removes what a VM has that has ended: by its State, as its owner may
// be an heir of the one who acquired it. For a VM that is not the pool's it does
// nothing.
func (p *Pool) Forget(ctx context.Context, state *vmm.State) error {
	if state == nil || filepath.Dir(state.Dir) != filepath.Clean(p.cfg.Dir) {
		return nil
	}
	rec, err := loadRecord(state.Dir)
	if errdefs.IsNotFound(err) {
		return os.RemoveAll(state.Dir)
	}
	if err != nil {
		rec = p.unknown(state.Dir)
	}
	return p.remove(ctx, rec, state.Dir)
}

// remove removes the files of a VM that has ended.
func (p *Pool) remove(ctx context.Context, rec *record, dir string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), discardLimit)
	defer cancel()
	errs := []error{failpoint.At(ctx, failpoint.DiscardScratch)}
	if rec.Scratch != "" && errs[0] == nil {
		if err := os.Remove(rec.Scratch); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
		errs = append(errs, os.RemoveAll(vmm.DisksDir(rec.Scratch)))
	}
	errs = append(errs, failpoint.At(ctx, failpoint.DiscardGroup))
	if rec.Cgroup != "" {
		errs = append(errs, vmm.OpenCgroup(rec.Cgroup).Remove(ctx))
	}
	errs = append(errs, failpoint.At(ctx, failpoint.DiscardDir))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove VM %s: %w", rec.ID, err)
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove VM %s: %w", rec.ID, err)
	}
	p.release(rec)
	p.cfg.Users.Release(rec.UID, rec.ID)
	return nil
}

// unknown is the record of a VM whose own cannot be read.
func (p *Pool) unknown(dir string) *record {
	id := filepath.Base(dir)
	return &record{ID: id, Scratch: p.scratch(id), Cgroup: p.idleGroup(id)}
}

// idBytes is the size of a VM's ID, whose text is twice as long: its directory
// names sockets, whose paths are short.
const idBytes = 6

func newID() string {
	b := make([]byte, idBytes)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

const scratchSuffix = ".img"

func (p *Pool) dir(id string) string { return filepath.Join(p.cfg.Dir, id) }

func (p *Pool) scratch(id string) string { return filepath.Join(p.cfg.ScratchDir, id+scratchSuffix) }

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
