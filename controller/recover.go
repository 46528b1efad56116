// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sync/errgroup"

	"github.com/cloudhv/containerd-cloudhv/vmpool/process"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

const (
	// recoverParallel is how many sandboxes are taken up at a time.
	recoverParallel = 16
	// damagedDir holds the records that could not be read.
	damagedDir = "damaged"
	// maxDamaged is how many of them are kept.
	maxDamaged = 16
)

// Recover takes up the sandboxes of an earlier containerd: it re-adopts what
// lives, ends what does not, and removes what no record claims. Call it once,
// before any other method and, as CRI asks for each sandbox as soon as it can,
// before the plugin is initialised. It returns within the configured limit; what
// it has begun to end by then goes on. One sandbox's failure costs no other.
func (c *Controller) Recover(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.RecoverTimeout)
	defer cancel()
	entries, err := os.ReadDir(c.cfg.StateDir)
	if errors.Is(err, fs.ErrNotExist) {
		return c.sweep(ctx)
	}
	if err != nil {
		return fmt.Errorf("read state directory: %w", err)
	}
	var g errgroup.Group
	g.SetLimit(recoverParallel)
	for _, e := range entries {
		if !e.IsDir() || e.Name() == damagedDir {
			continue
		}
		g.Go(func() error {
			ctx := withPod(ctx, e.Name())
			result, err := c.recoverPod(ctx, filepath.Join(c.cfg.StateDir, e.Name()))
			if err != nil {
				log.G(ctx).WithError(err).Error("cannot recover sandbox")
				result = "error"
			}
			recoverCounter.WithValues(result).Inc()
			return nil
		})
	}
	_ = g.Wait()
	return c.sweep(ctx)
}

// recoverPod takes up the sandbox in dir and tells what became of it.
func (c *Controller) recoverPod(ctx context.Context, dir string) (string, error) {
	rec, err := loadRecord(dir)
	switch {
	case errdefs.IsNotFound(err):
		// Create ended before it had recorded anything.
		return "removed", os.RemoveAll(dir)
	case errdefs.IsDataLoss(err):
		return "damaged", c.setAside(ctx, dir, err)
	case err != nil:
		return "", err
	}
	p := newPod(dir, *rec)
	close(p.started)
	if err := c.add(p); err != nil {
		return "", err
	}
	for key := range rec.Images {
		p.pins[key] = c.images.Pin(key)
	}
	if err := c.adopt(ctx, p); err != nil {
		return "", err
	}
	if c.isOrphan(ctx, rec) {
		return "orphan", c.endOrphan(ctx, p)
	}
	return c.resume(ctx, p)
}

// adopt takes hold of the sandbox's VM and shim if they live. A VM that lives
// but cannot be controlled is killed.
func (c *Controller) adopt(ctx context.Context, p *pod) error {
	rec := p.snapshot()
	if rec.Shim != nil {
		s, err := adoptShim(*rec.Shim)
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		p.shim = s
	}
	if rec.VM == nil || rec.State == StateStopped {
		return nil
	}
	driver := c.drivers[rec.VM.Driver]
	if driver == nil {
		return fmt.Errorf("its VM is %s's, which this build does not know: %w", rec.VM.Driver, errdefs.ErrNotImplemented)
	}
	vm, err := driver.Attach(ctx, *rec.VM)
	switch {
	case err == nil:
		p.vm = vm
	case !errdefs.IsNotFound(err):
		log.G(ctx).WithError(err).WithField("pid", rec.VM.Pid).Error("cannot take up a VM; it is killed")
		return killVMM(ctx, rec.VM)
	}
	return nil
}

// killVMM kills a VMM by its identity alone.
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

// isOrphan is true if containerd does not know the sandbox: whoever made it
// got an error, or gave it up, when nobody could tell us.
func (c *Controller) isOrphan(ctx context.Context, rec *record) bool {
	_, err := c.sandboxes.Get(namespaces.WithNamespace(ctx, rec.Namespace), rec.ID)
	if err != nil && !errdefs.IsNotFound(err) {
		log.G(ctx).WithError(err).Warn("cannot find out whether the sandbox is known")
	}
	return errdefs.IsNotFound(err)
}

func (c *Controller) endOrphan(ctx context.Context, p *pod) error {
	log.G(ctx).Warn("removing a sandbox that containerd does not know")
	if err := c.endAndWait(ctx, p, "containerd does not know the sandbox"); err != nil {
		return err
	}
	return c.remove(ctx, p)
}

// endAndWait ends a sandbox that was found.
func (c *Controller) endAndWait(ctx context.Context, p *pod, cause string) error {
	e := c.end(ctx, p, endReason{cause: cause, label: "recovery", status: exitKilled})
	select {
	case <-e.done:
		return e.err
	case <-ctx.Done():
		return fmt.Errorf("end sandbox %q: %w", p.id, context.Cause(ctx))
	}
}

// resume goes on with a sandbox as its record says.
func (c *Controller) resume(ctx context.Context, p *pod) (string, error) {
	rec := p.snapshot()
	switch rec.State {
	case StateStopped:
		p.ending = &ending{done: make(chan struct{})}
		close(p.ending.done)
		p.markExited()
		return "stopped", nil
	case StateCreated:
		return "ended", c.endAndWait(ctx, p, "containerd ended before the sandbox was started")
	case StateStarting:
		c.killStrays(ctx, p.dir, rec.Scratch)
		return "ended", c.endAndWait(ctx, p, "containerd ended while the sandbox was started")
	case StateStopping:
		return "ended", c.endAndWait(ctx, p, "stopped")
	}
	switch {
	case p.vm == nil:
		return "ended", c.endAndWait(ctx, p, "the VM ended while containerd was away")
	case p.shim == nil:
		return "ended", c.endAndWait(ctx, p, "the shim ended while containerd was away")
	}
	sandboxesGauge.Inc()
	c.watch(ctx, p, p.vm, p.shim)
	log.G(ctx).WithFields(log.Fields{"pid": p.vm.State().Pid, "shim": p.shim.id.Pid}).Info("took up sandbox")
	return "ready", nil
}

// setAside keeps a damaged record for people and removes the rest of its
// sandbox, which containerd is told does not exist.
func (c *Controller) setAside(ctx context.Context, dir string, damage error) error {
	keep := filepath.Join(c.cfg.StateDir, damagedDir)
	to := filepath.Join(keep, filepath.Base(dir)+".json")
	log.G(ctx).WithError(damage).WithField("kept", to).Error("a sandbox's record is damaged; its pod is ended")
	c.killStrays(ctx, dir, c.scratch.path(filepath.Base(dir)))
	if err := os.MkdirAll(keep, 0o700); err != nil {
		return fmt.Errorf("set damaged record aside: %w", err)
	}
	if kept, err := os.ReadDir(keep); err == nil && len(kept) >= maxDamaged {
		if err := os.Remove(filepath.Join(keep, kept[0].Name())); err != nil {
			return fmt.Errorf("remove an older damaged record: %w", err)
		}
	}
	if err := os.Rename(filepath.Join(dir, recordFile), to); err != nil {
		return fmt.Errorf("set damaged record aside: %w", err)
	}
	return errors.Join(os.RemoveAll(dir), removeScratch(c.scratch.path(filepath.Base(dir))))
}
