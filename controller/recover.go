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
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sync/errgroup"

	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

const (
	// recoverParallel is how many sandboxes are taken up at a time.
	recoverParallel = 8
	// damagedDir holds the records that could not be read.
	damagedDir = "damaged"
	// maxDamaged is how many of them are kept.
	maxDamaged = 16
)

// Recover takes up the sandboxes of an earlier containerd: it re-adopts what
// lives, ends what does not, and removes what no record claims. Call it once,
// before any other method and, as CRI asks for each sandbox as soon as it can,
// before the plugin is initialised.
//
// When it returns all sandboxes are known, and the ready ones are watched, by
// the identity of their processes. What takes longer than the configured limit,
// which is each sandbox's own and that of the whole, goes on in the background.
// One sandbox's failure costs no other.
func (c *Controller) Recover(ctx context.Context) error {
	entries, err := os.ReadDir(c.cfg.StateDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read state directory: %w", err)
	}
	var all []*found
	for _, e := range entries {
		// What no sandbox can be called is somebody else's: the pool's, or lost+found.
		if e.IsDir() && e.Name() != damagedDir && sandboxID.MatchString(e.Name()) {
			all = append(all, c.find(withPod(ctx, e.Name()), filepath.Join(c.cfg.StateDir, e.Name())))
		}
	}
	c.claimUsers(ctx)
	if err := c.blockNodes.Clear(); err != nil {
		log.G(ctx).WithError(err).Warn("cannot remove what an earlier containerd left")
	}
	// First, as the ending of a sandbox waits for a VM that it was about to get.
	if err := tryAtOnce(ctx, "recover the pool of VMs", func() error { return c.recoverPool(ctx) }); err != nil {
		log.G(ctx).WithError(err).Error("cannot recover the pool of VMs")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.recoverAll(context.WithoutCancel(ctx), all)
	}()
	limit := time.NewTimer(c.cfg.RecoverTimeout)
	defer limit.Stop()
	select {
	case <-done:
	case <-limit.C:
		log.G(ctx).WithField("limit", c.cfg.RecoverTimeout).Warn("not all sandboxes were taken up in time; that goes on")
	}
	sweepCtx, cancel := c.cleanup(ctx)
	defer cancel()
	err = tryAtOnce(ctx, "remove what nobody claims", func() error { return c.sweep(sweepCtx) })
	if c.pool != nil {
		c.pool.Run()
	}
	return errors.Join(err, failpoint.At(ctx, failpoint.RecoverDone))
}

// claimUsers takes the users of VMs that live, before any VM is made.
func (c *Controller) claimUsers(ctx context.Context) {
	for _, p := range c.allPods() {
		if rec := p.snapshot(); rec.State != StateStopped {
			c.users.Claim(rec.UID, p.id)
		}
	}
	if c.pool != nil {
		c.pool.ClaimUsers()
	}
	if err := c.users.ClaimRunning(); err != nil {
		log.G(ctx).WithError(err).Warn("cannot find out which users run processes")
	}
}

// found is a directory of an earlier containerd's sandbox.
type found struct {
	dir string
	// pod is nil if the record is of no use, for err.
	pod *pod
	// err is also why the pod's processes cannot be taken hold of.
	err error
}

// find makes the sandbox in dir known and takes hold of its processes. It waits
// for nobody.
func (c *Controller) find(ctx context.Context, dir string) *found {
	rec, err := readRecord(ctx, dir)
	if err != nil {
		return &found{dir: dir, err: err}
	}
	p := newPod(dir, *rec)
	close(p.started)
	if err := c.add(p); err != nil {
		return &found{dir: dir, err: err}
	}
	for key := range rec.Images {
		p.pins[key] = c.images.Pin(key)
	}
	err = tryAtOnce(ctx, "take hold of a sandbox's processes", func() error {
		if err := failpoint.At(ctx, failpoint.RecoverHold); err != nil {
			return err
		}
		return p.hold()
	})
	p.mu.Lock()
	defer p.mu.Unlock()
	switch rec.State {
	case StateStopped:
		p.ending = &ending{done: make(chan struct{})}
		close(p.ending.done)
		close(p.exited)
	case StateReady:
		if p.held != nil && p.shim != nil {
			c.watch(ctx, p, p.held, p.shim)
		}
	}
	return &found{dir: dir, pod: p, err: err}
}

// readRecord is loadRecord, and tries again if that says nothing about the record: a sandbox
// that nobody knows of is ended.
func readRecord(ctx context.Context, dir string) (rec *record, _ error) {
	err := tryAtOnce(ctx, "read the record of a sandbox", func() (err error) {
		if err = failpoint.At(ctx, failpoint.RecoverFind); err == nil {
			rec, err = loadRecord(dir)
		}
		return err
	})
	return rec, err
}

// recoverAll goes on with what was found, each within its own limit.
func (c *Controller) recoverAll(ctx context.Context, all []*found) {
	var g errgroup.Group
	g.SetLimit(recoverParallel)
	for _, f := range all {
		g.Go(func() error {
			ctx, cancel := context.WithTimeout(withPod(ctx, filepath.Base(f.dir)), c.cfg.RecoverTimeout)
			defer cancel()
			result, err := c.recoverOne(ctx, f)
			if err != nil {
				log.G(ctx).WithError(err).Error("cannot recover sandbox")
				result = "error"
				c.keepTrying(ctx, "recover a sandbox", c.cfg.RecoverTimeout, func(ctx context.Context) error { return c.recoverAgain(ctx, f) })
			}
			recoverCounter.WithValues(result).Inc()
			return nil
		})
	}
	_ = g.Wait()
}

// recoverAgain goes on with a sandbox with which that has failed. What others have removed
// meanwhile needs nothing.
func (c *Controller) recoverAgain(ctx context.Context, f *found) error {
	if f.pod == nil {
		if _, err := os.Lstat(f.dir); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		*f = *c.find(ctx, f.dir)
	} else if _, err := c.get(f.pod.id); errdefs.IsNotFound(err) {
		return nil
	}
	_, err := c.recoverOne(ctx, f)
	return err
}

// recoverOne goes on with a sandbox and tells what became of it.
func (c *Controller) recoverOne(ctx context.Context, f *found) (string, error) {
	switch {
	case f.pod != nil:
	case errdefs.IsNotFound(f.err):
		// Create ended before it had recorded anything.
		if err := failpoint.At(ctx, failpoint.RecoverNone); err != nil {
			return "", err
		}
		return "removed", os.RemoveAll(f.dir)
	case errdefs.IsDataLoss(f.err):
		return "damaged", c.setAside(ctx, f.dir, f.err)
	default:
		return "", f.err
	}
	rec := f.pod.snapshot()
	if rec.State != StateStopped && f.err != nil {
		// It cannot be watched. Its end looks for its processes again, by the record.
		return "ended", c.endAndWait(ctx, f.pod, "its processes cannot be taken hold of: "+f.err.Error())
	}
	if c.isOrphan(ctx, &rec) {
		return "orphan", c.endOrphan(ctx, f.pod)
	}
	return c.resume(ctx, f.pod)
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
	ctx, cancel := c.cleanup(ctx)
	defer cancel()
	if err := failpoint.At(ctx, failpoint.RecoverOrphan); err != nil {
		return err
	}
	if err := c.endAndWait(ctx, p, "containerd does not know the sandbox"); err != nil {
		return err
	}
	return c.remove(ctx, p)
}

// endAndWait ends a sandbox that was found.
func (c *Controller) endAndWait(ctx context.Context, p *pod, cause string) error {
	if err := failpoint.At(ctx, failpoint.RecoverEnd); err != nil {
		return err
	}
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
		return "stopped", nil
	case StateCreated:
		return "ended", c.endAndWait(ctx, p, "containerd ended before the sandbox was started")
	case StateStarting:
		c.killStrays(ctx, p.dir, rec.Scratch)
		return "ended", c.endAndWait(ctx, p, "containerd ended while the sandbox was started")
	case StateStopping:
		return "ended", c.endAndWait(ctx, p, "stopped")
	}
	p.mu.Lock()
	held, s := p.held, p.shim
	p.mu.Unlock()
	switch {
	case held == nil:
		return "ended", c.endAndWait(ctx, p, "the VM ended while containerd was away")
	case s == nil:
		return "ended", c.endAndWait(ctx, p, "the shim ended while containerd was away")
	}
	result, err := c.takeUp(ctx, p)
	if result == resultPending {
		go c.keepTakingUp(context.WithoutCancel(ctx), p)
	}
	return result, err
}

// setAside keeps a damaged record for people and removes the rest of its
// sandbox, which containerd is told does not exist.
func (c *Controller) setAside(ctx context.Context, dir string, damage error) error {
	keep := filepath.Join(c.cfg.StateDir, damagedDir)
	to := filepath.Join(keep, filepath.Base(dir)+".json")
	log.G(ctx).WithError(damage).WithField("kept", to).Error("a sandbox's record is damaged; its pod is ended")
	id, group := filepath.Base(dir), linkedGroup(dir)
	if err := failpoint.At(ctx, failpoint.RecoverAside); err != nil {
		return err
	}
	c.killStrays(ctx, dir, c.scratch.path(id))
	if group != "" {
		err := errors.Join(vmm.OpenCgroup(group).Remove(ctx), c.removeShimGroups(ctx, id, group))
		if err != nil {
			log.G(ctx).WithError(err).Warn("cannot remove the cgroups of a sandbox whose record is damaged")
		}
	}
	if err := c.keepDamaged(filepath.Join(dir, recordFile), to); err != nil {
		return fmt.Errorf("set damaged record aside: %w", err)
	}
	return errors.Join(os.RemoveAll(dir), removeScratch(c.scratch.path(filepath.Base(dir))))
}

// keepDamaged moves a record to where damaged ones are kept, of which the oldest goes
// when there are too many.
func (c *Controller) keepDamaged(from, to string) error {
	c.keeping.Lock() // several sandboxes are recovered at a time
	defer c.keeping.Unlock()
	keep := filepath.Dir(to)
	if err := os.MkdirAll(keep, 0o700); err != nil {
		return err
	}
	entries, err := os.ReadDir(keep)
	if err != nil {
		return err
	}
	var oldest fs.FileInfo
	for _, e := range entries {
		st, err := e.Info()
		if err != nil {
			return err
		}
		if oldest == nil || st.ModTime().Before(oldest.ModTime()) {
			oldest = st
		}
	}
	if len(entries) >= maxDamaged {
		if err := os.Remove(filepath.Join(keep, oldest.Name())); err != nil {
			return err
		}
	}
	return os.Rename(from, to)
}
