// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmpool

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sync/errgroup"

	"github.com/cloudhv/containerd-cloudhv/vmpool/process"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// recoverParallel is how many VMs are taken up at a time.
const recoverParallel = 8

// Recover takes up the VMs of an earlier process. owned tells by its directory
// whether a VM is a pod's, who will end it. The others are adopted where they
// still fit the configuration and answer, and ended where they do not. What no
// record claims is removed. One VM's failure costs no other.
func (p *Pool) Recover(ctx context.Context, owned func(dir string) bool) error {
	entries, err := os.ReadDir(p.cfg.Dir)
	if err != nil {
		return fmt.Errorf("recover the pool: %w", err)
	}
	var g errgroup.Group
	g.SetLimit(recoverParallel)
	for _, e := range entries {
		dir := filepath.Join(p.cfg.Dir, e.Name())
		if owned(dir) {
			if rec, err := loadRecord(dir); err == nil && rec.Key != "" {
				p.cfg.Store.Use(rec.Key, rec.ID)
			}
			continue
		}
		g.Go(func() error { return p.recoverVM(ctx, dir) })
	}
	err = g.Wait()
	return errors.Join(err, p.sweep(ctx))
}

// sweep removes the disks of VMs that are not there.
func (p *Pool) sweep(ctx context.Context) error {
	entries, err := os.ReadDir(p.cfg.ScratchDir)
	if err != nil {
		return fmt.Errorf("recover the pool: %w", err)
	}
	var errs []error
	for _, e := range entries {
		path := filepath.Join(p.cfg.ScratchDir, e.Name())
		_, err := os.Lstat(filepath.Join(p.cfg.Dir, strings.TrimSuffix(e.Name(), scratchSuffix)))
		if !errors.Is(err, fs.ErrNotExist) || !strings.HasSuffix(path, scratchSuffix) {
			continue
		}
		log.G(ctx).WithField("path", path).Info("removing a disk that no VM claims")
		errs = append(errs, os.Remove(path))
	}
	return errors.Join(errs...)
}

// recoverVM adopts the VM in dir, or ends it.
func (p *Pool) recoverVM(ctx context.Context, dir string) error {
	ctx = log.WithLogger(ctx, log.G(ctx).WithField("vm", filepath.Base(dir)))
	rec, err := loadRecord(dir)
	if err != nil {
		if !errdefs.IsNotFound(err) {
			log.G(ctx).WithError(err).Warn("removing a VM whose record cannot be read")
		}
		id := filepath.Base(dir)
		return p.remove(&record{ID: id, Scratch: p.scratch(id)}, dir)
	}
	if rec.VM == nil {
		return p.remove(rec, dir) // its VMM was never recorded; the caller kills strays
	}
	v, err := p.cfg.Driver.Attach(ctx, *rec.VM)
	if errdefs.IsNotFound(err) {
		return p.remove(rec, dir)
	}
	if err != nil {
		log.G(ctx).WithError(err).Warn("a VM of an earlier process cannot be taken up; it is killed")
		if err := killVMM(ctx, rec.VM); err != nil {
			return fmt.Errorf("kill VM %s: %w", rec.ID, err)
		}
		return p.remove(rec, dir)
	}
	vm := &VM{VM: v, Scratch: rec.Scratch, Dir: dir, rec: *rec}
	if why := p.unfit(rec); why != "" {
		log.G(ctx).WithField("why", why).Info("ending a VM of an earlier process")
		return p.Discard(ctx, vm)
	}
	p.cfg.Store.Use(rec.Key, rec.ID)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.addReady(vm)
	return nil
}

// killVMM kills a VMM by its identity.
func killVMM(ctx context.Context, vm *vmm.State) error {
	h, err := process.Identity{Pid: vm.Pid, StartTime: vm.StartTime, BootID: vm.BootID}.Open()
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer h.Close()
	return h.Kill(ctx)
}

// unfit says why a VM cannot be handed out, or nothing.
func (p *Pool) unfit(rec *record) string {
	switch {
	case rec.Owner != "":
		return "it was given to pod " + rec.Owner + ", which is gone"
	case !rec.Ready:
		return "it was not ready"
	case rec.Key != p.key:
		return "it is of another snapshot"
	default:
		return ""
	}
}

// Pids are the processes of the pool's VMs, those of pods included.
func (p *Pool) Pids() []int {
	var pids []int
	for _, rec := range p.records() {
		if rec.VM != nil {
			pids = append(pids, rec.VM.Pid)
		}
	}
	return pids
}

// Unrecorded are the disks of VMs whose VMM, if there is one, was not recorded
// when an earlier process ended. Its command line names the disk.
func (p *Pool) Unrecorded() []string {
	var disks []string
	for _, rec := range p.records() {
		if rec.VM == nil {
			disks = append(disks, p.scratch(rec.ID))
		}
	}
	return disks
}

// records are those that can be read.
func (p *Pool) records() []*record {
	entries, err := os.ReadDir(p.cfg.Dir)
	if err != nil {
		return nil
	}
	var list []*record
	for _, e := range entries {
		if rec, err := loadRecord(filepath.Join(p.cfg.Dir, e.Name())); err == nil {
			list = append(list, rec)
		}
	}
	return list
}
