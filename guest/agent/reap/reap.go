// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package reap collects every process that ends in the VM, orphans too, and
// tells those who asked. The collecting itself is containerd's pkg/sys/reaper,
// which go-runc's commands wait by as well; this package adds what a container's
// process needs: its pid is known only after it may already have ended.
package reap

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/pkg/sys/reaper"
	runc "github.com/containerd/go-runc"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// Exit tells how a process ended.
type Exit struct {
	Pid int
	// Status is the exit code, or 128 and the signal's number.
	Status int
	At     time.Time
}

// Reaper hands out exits. Make it with Start.
type Reaper struct {
	mu sync.Mutex
	// watched are processes whose pid is known.
	watched map[int]func(Exit)
	// births are starts in progress; each collects all exits until it knows which
	// of them, if any, is its own.
	births map[*Birth]struct{}
}

// Start makes this process the one that orphans fall to (PID 1 is that anyway),
// and reaps until ctx ends. From now on commands must be run by go-runc's
// Monitor, which Start sets, and not by os/exec alone. It is called once.
func Start(ctx context.Context) (*Reaper, error) {
	if os.Getpid() != 1 {
		if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
			return nil, fmt.Errorf("become child subreaper: %w", err)
		}
	}
	runc.Monitor = reaper.Default
	r := &Reaper{watched: make(map[int]func(Exit)), births: make(map[*Birth]struct{})}
	exits := reaper.Default.Subscribe()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGCHLD)
	go func() {
		for e := range exits {
			r.exited(Exit{Pid: e.Pid, Status: e.Status, At: e.Timestamp})
		}
	}()
	go func() {
		defer reaper.Default.Unsubscribe(exits)
		defer signal.Stop(signals)
		for {
			// Before the first signal too: a child may have ended before Notify.
			if err := reaper.Reap(); err != nil {
				log.G(ctx).WithError(err).Warn("cannot reap processes")
			}
			select {
			case <-ctx.Done():
				return
			case <-signals:
			}
		}
	}()
	return r, nil
}

// exited tells about one exit. Callbacks run without the lock held.
func (r *Reaper) exited(e Exit) {
	r.mu.Lock()
	for b := range r.births {
		b.exits[e.Pid] = e
	}
	fn := r.watched[e.Pid]
	delete(r.watched, e.Pid)
	r.mu.Unlock()
	if fn != nil {
		fn(e)
	}
}

// Birth is the start of a process whose pid is not known yet.
type Birth struct {
	r     *Reaper
	exits map[int]Exit
}

// Expect must be called before a process is started, and End after it.
func (r *Reaper) Expect() *Birth {
	b := &Birth{r: r, exits: make(map[int]Exit)}
	r.mu.Lock()
	r.births[b] = struct{}{}
	r.mu.Unlock()
	return b
}

// Watch has fn called once when the process ends, at once if it has already.
// fn must not block.
func (b *Birth) Watch(pid int, fn func(Exit)) {
	b.r.mu.Lock()
	e, gone := b.exits[pid]
	if !gone {
		b.r.watched[pid] = fn
	}
	b.r.mu.Unlock()
	if gone {
		fn(e)
	}
}

// End forgets what was collected for this birth. It may be called twice.
func (b *Birth) End() {
	b.r.mu.Lock()
	delete(b.r.births, b)
	b.r.mu.Unlock()
}
