// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmpool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
	"github.com/cloudhv/containerd-cloudhv/vmpool/snapshot"
	"github.com/cloudhv/containerd-cloudhv/vmpool/sparse"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// plan makes the directory and the record of a new VM, and its configuration. The
// snapshot with the ID snap, if any, is held for it. One that no pod has taken runs in
// a group of its own, and each as a user of its own.
func (p *Pool) plan(ctx context.Context, id, snap string, req Request) (*VM, vmm.Config, error) {
	owner, cgroup := req.Owner, req.Cgroup
	if owner == "" {
		cgroup = p.idleGroup(id)
	}
	uid, err := p.cfg.Users.Take(id)
	if err != nil {
		return nil, vmm.Config{}, fmt.Errorf("make VM %s: %w", id, err)
	}
	vm := &VM{Dir: p.dir(id), Scratch: p.scratch(id), Made: time.Now()}
	vm.rec = record{ID: id, Key: snap, Scratch: vm.Scratch, Cgroup: cgroup, UID: uid, Owner: owner, Made: vm.Made.Round(0)}
	if err := vm.begin(ctx); err != nil {
		p.cfg.Users.Release(uid, id)
		return nil, vmm.Config{}, fmt.Errorf("make VM %s: %w", id, err)
	}
	cfg := p.cfg.Machine
	cfg.ID, cfg.Dir, cfg.Scratch, cfg.CgroupPath = id, vm.Dir, vm.Scratch, cgroup
	cfg.UID = uid
	cfg.KernelParams = slices.Clone(cfg.KernelParams)
	return vm, cfg, nil
}

// begin makes the directory and the record of a new VM. After an error there is none.
func (vm *VM) begin(ctx context.Context) error {
	if err := failpoint.At(ctx, failpoint.VMDir); err != nil {
		return err
	}
	if err := os.Mkdir(vm.Dir, 0o700); err != nil {
		return err
	}
	if err := vm.save(ctx, failpoint.VMRecord); err != nil {
		return errors.Join(err, os.RemoveAll(vm.Dir))
	}
	return nil
}

// save writes the record. Point is where tests may let that fail.
func (vm *VM) save(ctx context.Context, point failpoint.Point) error {
	if err := failpoint.At(ctx, point); err != nil {
		return err
	}
	return vm.rec.save(vm.Dir)
}

// giveTAP makes the TAP of a VM that is about to start, whose own the file is from then on.
func (p *Pool) giveTAP(cfg *vmm.Config) (closeTAP func(), err error) {
	if p.cfg.NewTAP == nil {
		return func() {}, nil
	}
	if cfg.TAP, err = p.cfg.NewTAP(cfg.ID); err != nil {
		return nil, fmt.Errorf("make VM %s: %w", cfg.ID, err)
	}
	return func() { _ = cfg.TAP.Close() }, nil
}

// undo removes a VM that could not be made.
func (p *Pool) undo(vm *VM, why error) error {
	if vm.VM != nil {
		ctx, cancel := context.WithTimeout(context.Background(), discardLimit)
		defer cancel()
		return errors.Join(why, p.discardSurely(ctx, vm))
	}
	return errors.Join(why, p.discardSurely(context.Background(), vm))
}

// started completes the record of a VM whose VMM runs.
func (vm *VM) started(ctx context.Context, point failpoint.Point, v vmm.VM) error {
	vm.VM = v
	state := v.State()
	vm.rec.VM = &state
	return vm.save(ctx, point)
}

// restore restores a VM, for a pod or for the pool.
func (p *Pool) restore(ctx context.Context, snap *snapshot.Snapshot, req Request) (vm *VM, err error) {
	err = step(ctx, "restore", func(ctx context.Context) error {
		vm, err = p.restoreNow(ctx, snap, req)
		return err
	})
	return vm, err
}

func (p *Pool) restoreNow(ctx context.Context, snap *snapshot.Snapshot, req Request) (_ *VM, retErr error) {
	id := newID()
	if snap.ID != "" {
		// It may have been rebuilt since the caller looked.
		held, err := p.cfg.Store.Hold(p.key, id)
		if err != nil {
			return nil, err
		}
		snap = held
	}
	vm, cfg, err := p.plan(ctx, id, snap.ID, req)
	if err != nil {
		p.cfg.Store.Release(snap.ID, id)
		return nil, err
	}
	defer func() {
		if retErr != nil {
			retErr = p.undo(vm, retErr)
		}
	}()
	vm.Outcome = Miss
	if err := failpoint.At(ctx, failpoint.VMScratch); err != nil {
		return nil, err
	}
	if err := sparse.CopyFile(vm.Scratch, snap.Scratch); err != nil {
		return nil, err
	}
	if err := failpoint.At(ctx, failpoint.VMTAP); err != nil {
		return nil, err
	}
	closeTAP, err := p.giveTAP(&cfg)
	if err != nil {
		return nil, err
	}
	defer closeTAP()
	if err := failpoint.At(ctx, failpoint.VMRestore); err != nil {
		return nil, err
	}
	v, err := p.cfg.Driver.Restore(ctx, cfg, snap.VMM)
	if err != nil {
		err = fmt.Errorf("restore a VM: %w", err)
		p.Report(ctx, vm, err)
		return nil, err
	}
	restoreTimer.UpdateSince(vm.Made)
	return vm, vm.started(ctx, failpoint.VMStarted, v)
}

// badSnapshot is how many restores may fail one after the other until the
// snapshot is taken to be the reason.
const badSnapshot = 3

// Report tells whether a VM that was restored runs: its guest has answered, or
// err says why not. A snapshot whose VMs do not, one after the other, is made anew.
func (p *Pool) Report(ctx context.Context, vm *VM, err error) {
	if vm.rec.Key != p.cfg.Store.Current(p.key) {
		return // it says nothing about the snapshot in use
	}
	if err == nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.badRestores = 0
		return
	}
	if errors.Is(ctx.Err(), context.Canceled) || ctx.Err() != nil && vm.rec.Owner != "" {
		return // the caller left, or a pod's time was over, which says nothing
	}
	p.blame(ctx, vm.rec.Key, err)
}

// blame counts a failure against the snapshot.
func (p *Pool) blame(ctx context.Context, key string, err error) {
	failCounter.WithValues("restore").Inc()
	p.mu.Lock()
	p.lastErr = err
	p.badRestores++
	bad := p.badRestores == badSnapshot
	if bad {
		p.badRestores = 0
	}
	p.mu.Unlock()
	if !bad {
		return
	}
	log.G(ctx).WithError(err).WithField("snapshot", key).Error("VMs cannot be restored from a snapshot; it is made anew")
	if err := p.cfg.Store.SetAside(key); err != nil {
		log.G(ctx).WithError(err).Error("cannot set a snapshot aside")
	}
	p.poke()
}

// restLimit bounds the wait for a template's rest.
const restLimit = 3 * time.Second

// template boots a VM into dir and makes the snapshot of it.
func (p *Pool) template(ctx context.Context, dir string) (_ vmm.Snapshot, retErr error) {
	ctx, cancel := context.WithTimeout(ctx, p.cfg.SnapshotLimit)
	defer cancel()
	vm, cfg, err := p.plan(ctx, newID(), "", Request{})
	if err != nil {
		return vmm.Snapshot{}, err
	}
	defer func() { retErr = p.undo(vm, retErr) }()
	if err := failpoint.At(ctx, failpoint.SnapshotScratch); err != nil {
		return vmm.Snapshot{}, err
	}
	if err := p.cfg.NewScratch(ctx, vm.Scratch); err != nil {
		return vmm.Snapshot{}, err
	}
	if err := failpoint.At(ctx, failpoint.SnapshotTAP); err != nil {
		return vmm.Snapshot{}, err
	}
	cfg.MemoryFile = filepath.Join(dir, snapshot.MemoryFile)
	closeTAP, err := p.giveTAP(&cfg)
	if err != nil {
		return vmm.Snapshot{}, err
	}
	defer closeTAP()
	var v vmm.VM
	err = step(ctx, "boot", func(ctx context.Context) error {
		if err := failpoint.At(ctx, failpoint.SnapshotBoot); err != nil {
			return err
		}
		v, err = p.cfg.Driver.Boot(ctx, cfg)
		return err
	})
	if err != nil {
		return vmm.Snapshot{}, fmt.Errorf("boot the template: %w", err)
	}
	if err := vm.started(ctx, failpoint.SnapshotStarted, v); err != nil {
		return vmm.Snapshot{}, err
	}
	if err := p.makeWarm(ctx, v); err != nil {
		return vmm.Snapshot{}, err
	}
	snap, err := p.save(ctx, v)
	if err != nil {
		return vmm.Snapshot{}, err
	}
	scratch := filepath.Join(dir, snapshot.ScratchFile)
	if err := takeDisk(ctx, vm.Scratch, scratch); err != nil {
		return vmm.Snapshot{}, err
	}
	if err := failpoint.At(ctx, failpoint.SnapshotProve); err != nil {
		return vmm.Snapshot{}, err
	}
	return snap, p.prove(ctx, &snapshot.Snapshot{VMM: snap, Scratch: scratch})
}

// makeWarm waits for a template's guest, and makes it warm.
func (p *Pool) makeWarm(ctx context.Context, v vmm.VM) error {
	if err := failpoint.At(ctx, failpoint.SnapshotAnswer); err != nil {
		return err
	}
	if err := p.answer(ctx, v); err != nil {
		return fmt.Errorf("the template: %w", err)
	}
	if err := failpoint.At(ctx, failpoint.SnapshotWarmUp); err != nil {
		return err
	}
	if err := p.warmUp(ctx, v); err != nil {
		return fmt.Errorf("warm the template up: %w", err)
	}
	return nil
}

// save makes the snapshot of a template that is warm, which it ends.
func (p *Pool) save(ctx context.Context, v vmm.VM) (snap vmm.Snapshot, _ error) {
	rest, cancelRest := context.WithTimeout(ctx, restLimit)
	defer cancelRest()
	if err := failpoint.At(ctx, failpoint.SnapshotDisconnect); err != nil {
		return snap, err
	}
	if err := v.Disconnect(rest); err != nil {
		return snap, fmt.Errorf("let go of the template: %w", err)
	}
	if err := failpoint.At(ctx, failpoint.SnapshotPause); err != nil {
		return snap, err
	}
	if err := v.Pause(ctx); err != nil {
		return snap, fmt.Errorf("pause the template: %w", err)
	}
	if err := failpoint.At(ctx, failpoint.SnapshotSave); err != nil {
		return snap, err
	}
	err := step(ctx, "save", func(ctx context.Context) (err error) {
		snap, err = v.Snapshot(ctx)
		return err
	})
	if err != nil {
		return snap, err
	}
	if err := failpoint.At(ctx, failpoint.SnapshotKill); err != nil {
		return snap, err
	}
	return snap, v.Kill(ctx)
}

// takeDisk makes a template's disk the snapshot's.
func takeDisk(ctx context.Context, from, to string) error {
	if err := failpoint.At(ctx, failpoint.SnapshotDisk); err != nil {
		return err
	}
	if err := move(from, to); err != nil {
		return err
	}
	if err := failpoint.At(ctx, failpoint.SnapshotOwner); err != nil {
		return err
	}
	// The user that its VM had will be another's.
	return os.Chown(to, os.Getuid(), os.Getgid())
}

// prove restores a VM from a snapshot that nobody uses yet, and awaits its answer.
func (p *Pool) prove(ctx context.Context, snap *snapshot.Snapshot) (retErr error) {
	vm, err := p.restore(ctx, snap, Request{})
	if err != nil {
		return fmt.Errorf("the new snapshot: %w", err)
	}
	defer func() { retErr = p.undo(vm, retErr) }()
	if err := p.answer(ctx, vm); err != nil {
		return fmt.Errorf("the new snapshot: %w", err)
	}
	return nil
}

// answer and warmUp wait for a guest.
func (p *Pool) answer(ctx context.Context, vm vmm.VM) error {
	return step(ctx, "answer", func(ctx context.Context) error { return p.cfg.Guest.Ready(ctx, vm) })
}

func (p *Pool) warmUp(ctx context.Context, vm vmm.VM) error {
	return step(ctx, "warm_up", func(ctx context.Context) error { return p.cfg.Guest.WarmUp(ctx, vm) })
}

// move renames a disk, or copies it to another file system. The caller removes
// the first.
func move(from, to string) error {
	err := os.Rename(from, to)
	if errors.Is(err, unix.EXDEV) {
		return sparse.CopyFile(to, from)
	}
	return err
}

// idleGroup is the cgroup of a VM that no pod has taken yet.
func (p *Pool) idleGroup(id string) string {
	if p.cfg.Cgroup == "" {
		return ""
	}
	return path.Join(p.cfg.Cgroup, id)
}

// use and release keep a snapshot for a VM, and let it go.
func (p *Pool) use(snap, id string) {
	if p.cfg.Store != nil {
		p.cfg.Store.Use(snap, id)
	}
}

func (p *Pool) release(rec *record) {
	if p.cfg.Store == nil || rec.Key == "" {
		return
	}
	p.cfg.Store.Release(rec.Key, rec.ID)
	if rec.Key == p.cfg.Store.Current(p.key) {
		return
	}
	p.collect()
}
