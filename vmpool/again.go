// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmpool

import (
	"context"
	"slices"
	"time"

	"github.com/containerd/log"
)

// firstAgain is the pause before something that has failed is tried again, which doubles up
// to longestPause.
const firstAgain = 500 * time.Millisecond

// keepTrying does in the background what has failed and nobody else will do again, until it
// succeeds or the pool is closed: the next process finds what is left.
func (p *Pool) keepTrying(do func(context.Context) error) {
	p.wg.Go(func() {
		for pause := firstAgain; ; pause = min(2*pause, longestPause) {
			timer := time.NewTimer(pause)
			select {
			case <-timer.C:
			case <-p.ctx.Done():
				timer.Stop()
				return
			}
			ctx, cancel := context.WithTimeout(p.ctx, discardLimit)
			err := do(ctx)
			cancel()
			if err == nil {
				return
			}
			log.G(p.ctx).WithError(err).WithField("pause", pause).Error("what the pool has left cannot be removed; it is tried again")
		}
	})
}

// discardSurely ends a VM that is nobody's, with a VMM or without, and removes all that it
// has. If that fails it is tried again in the background.
func (p *Pool) discardSurely(ctx context.Context, vm *VM) error {
	discard := func(ctx context.Context) error {
		if vm.VM == nil {
			return p.remove(ctx, &vm.rec, vm.Dir)
		}
		return p.Discard(ctx, vm)
	}
	err := discard(ctx)
	if err != nil {
		p.keepTrying(discard)
	}
	return err
}

// collect removes the snapshots that nothing wants.
func (p *Pool) collect() {
	collect := func(ctx context.Context) error { return p.cfg.Store.Collect(ctx, p.key) }
	if err := collect(p.ctx); err != nil {
		log.G(p.ctx).WithError(err).Warn("cannot remove snapshots that nothing wants; it is tried again")
		p.keepTrying(collect)
	}
}

// isReady is true for the directory of a VM that is ready.
func (p *Pool) isReady(dir string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.ContainsFunc(p.ready, func(vm *VM) bool { return vm.Dir == dir })
}
