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
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sync/errgroup"

	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
	"github.com/cloudhv/containerd-cloudhv/vmpool/snapshot"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

const (
	// recoverParallel is how many VMs are taken up at a time.
	recoverParallel = 8
	// attachLimit bounds the taking up of one: there are others.
	attachLimit = 3 * time.Second
)

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
				p.use(rec.Key, rec.ID)
			}
			continue
		}
		g.Go(func() error {
			if p.isReady(dir) {
				return nil // this is tried again
			}
			err := p.recoverVM(ctx, dir)
			if err != nil {
				log.G(ctx).WithError(err).WithField("vm", e.Name()).Error("cannot recover a VM of the pool; it is tried again")
				p.keepTrying(func(ctx context.Context) error { return p.recoverVM(ctx, dir) })
			}
			return nil
		})
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
		id, _, ours := strings.Cut(e.Name(), scratchSuffix)
		_, err := os.Lstat(filepath.Join(p.cfg.Dir, id))
		if !errors.Is(err, fs.ErrNotExist) || !ours {
			continue
		}
		log.G(ctx).WithField("path", path).Info("removing a disk that no VM claims")
		errs = append(errs, os.RemoveAll(path))
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
		return p.remove(ctx, p.unknown(dir), dir)
	}
	if rec.VM == nil {
		return p.remove(ctx, rec, dir) // its VMM was never recorded; the caller kills strays
	}
	if why := p.unfit(rec); why != "" {
		log.G(ctx).WithField("why", why).Info("ending a VM of an earlier process")
		return p.kill(ctx, rec, dir)
	}
	attach, cancel := context.WithTimeout(ctx, attachLimit)
	defer cancel()
	err = failpoint.At(attach, failpoint.RecoverPoolAttach)
	var v vmm.VM
	if err == nil {
		v, err = p.cfg.Driver.Attach(attach, *rec.VM)
	}
	if err != nil {
		if !errdefs.IsNotFound(err) {
			log.G(ctx).WithError(err).Warn("a VM of an earlier process cannot be taken up; it is killed")
		}
		return p.kill(ctx, rec, dir)
	}
	vm := &VM{VM: v, Scratch: rec.Scratch, Dir: dir, Made: rec.Made, rec: *rec}
	p.use(rec.Key, rec.ID)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.addReady(vm)
	return nil
}

// kill kills a VMM by its identity, and removes what it has.
func (p *Pool) kill(ctx context.Context, rec *record, dir string) error {
	h, err := rec.VM.Identity().Open()
	switch {
	case errdefs.IsNotFound(err):
		return p.remove(ctx, rec, dir)
	case err != nil:
		return fmt.Errorf("kill VM %s: %w", rec.ID, err)
	}
	defer h.Close()
	if err := failpoint.At(ctx, failpoint.RecoverPoolKill); err != nil {
		return err
	}
	if err := h.Kill(ctx); err != nil {
		return fmt.Errorf("kill VM %s: %w", rec.ID, err)
	}
	return p.remove(ctx, rec, dir)
}

// unfit says why a VM cannot be handed out, or nothing.
func (p *Pool) unfit(rec *record) string {
	switch {
	case p.cfg.Off:
		return "the pool is off"
	case rec.Owner != "":
		return "it was given to pod " + rec.Owner + ", which is gone"
	case !rec.Ready:
		return "it was not ready"
	case snapshot.KeyOf(rec.Key) != p.key:
		return "it is of another snapshot"
	case rec.VM.Driver != p.cfg.Driver.Name():
		return "it is another hypervisor's"
	default:
		return ""
	}
}

// ClaimUsers takes the users of all VMs that there are records of. It comes before any
// VM is made.
func (p *Pool) ClaimUsers() {
	for _, rec := range p.records() {
		p.cfg.Users.Claim(rec.UID, rec.ID)
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
// when an earlier process ended, or whose record cannot be read. Its command line
// names the disk.
func (p *Pool) Unrecorded() []string {
	var disks []string
	for _, rec := range p.records() {
		if rec.VM == nil {
			disks = append(disks, p.scratch(rec.ID))
		}
	}
	return disks
}

// records are those of all VMs, without a VMM where they cannot be read.
func (p *Pool) records() []*record {
	entries, err := os.ReadDir(p.cfg.Dir)
	if err != nil {
		return nil
	}
	var list []*record
	for _, e := range entries {
		dir := filepath.Join(p.cfg.Dir, e.Name())
		rec, err := loadRecord(dir)
		if err != nil {
			rec = p.unknown(dir)
		}
		list = append(list, rec)
	}
	return list
}
