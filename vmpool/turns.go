// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmpool

import (
	"context"
	"sync"
	"time"
)

// yieldLimit is how long what is done in the background lets pods that are being
// started go first: under a steady stream of them it must go on too.
const yieldLimit = 2 * time.Second

// Turns says who has the processors: pods that are being started go before what
// is done in the background. Its methods may be called concurrently.
type Turns struct {
	mu   sync.Mutex
	busy int
	// changed is closed, and replaced, when busy becomes 0 or is 0 no more.
	changed chan struct{}
}

// NewTurns returns Turns without anybody.
func NewTurns() *Turns {
	return &Turns{changed: make(chan struct{})}
}

// Begin holds back what is done in the background until the function it returns
// is called: a pod is being started.
func (t *Turns) Begin() (done func()) {
	t.add(1)
	return sync.OnceFunc(func() { t.add(-1) })
}

func (t *Turns) add(n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	before := t.busy
	t.busy += n
	if (before == 0) != (t.busy == 0) {
		close(t.changed)
		t.changed = make(chan struct{})
	}
}

// Yield lets pods that are being started go first, for two seconds at most.
func (t *Turns) Yield(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, yieldLimit)
	defer cancel()
	t.await(ctx, func(busy int) bool { return busy == 0 })
}

// Taken waits until a pod is being started; it returns false if ctx ends before.
func (t *Turns) Taken(ctx context.Context) bool {
	return t.await(ctx, func(busy int) bool { return busy > 0 })
}

func (t *Turns) await(ctx context.Context, wanted func(busy int) bool) bool {
	for {
		t.mu.Lock()
		ok, changed := wanted(t.busy), t.changed
		t.mu.Unlock()
		if ok && ctx.Err() == nil {
			return true
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}
