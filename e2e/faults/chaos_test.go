// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package faults

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint/points"
)

const (
	// chaosPods is how many pods there are at once.
	chaosPods = 3
	// roundTime is how long things go wrong, until the node comes to rest and is looked at.
	roundTime = 15 * time.Second
	// hangs is how long somebody hangs at a point, at the most.
	hangs = time.Second
	// calms is how long a pod may take to be as it should when nothing goes wrong any more.
	calms = 2 * time.Minute
	// defaultChaos is for how long it goes on if nobody says.
	defaultChaos = 30 * time.Second
)

// chaos is one round.
type chaos struct {
	w      *world
	points []points.Declared
	rng    *rand.Rand

	mu  sync.Mutex
	log []string
}

// TestChaos lets anything go wrong anywhere, on several pods at once, in rounds: which point,
// what happens there and when is by the seed. After each round all pods have to come up, and
// go, and nothing may be left.
func TestChaos(t *testing.T) {
	rng := seeded(t)
	duration := defaultChaos
	if minutes, err := strconv.ParseFloat(os.Getenv("CHAOS_MINUTES"), 64); err == nil {
		duration = time.Duration(minutes * float64(time.Minute))
	}
	repo, err := testnode.FindRepo()
	require.NoError(t, err)
	all, err := points.All(repo)
	require.NoError(t, err)
	w := newWorld(t, 1, nil)
	for round, end := 1, time.Now().Add(duration); time.Now().Before(end); round++ {
		c := &chaos{w: w, points: all, rng: rand.New(rand.NewPCG(rng.Uint64(), 0))}
		c.note("round %d", round)
		err := c.round(roundTime)
		for _, line := range c.log {
			t.Log(line)
		}
		if err != nil {
			t.Log(w.LogTail(6000))
		}
		require.NoError(t, err)
	}
}

func (c *chaos) note(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.log = append(c.log, time.Now().Format("15:04:05.000 ")+fmt.Sprintf(format, args...))
}

// round lets things go wrong for a while, and looks what is left.
func (c *chaos) round(d time.Duration) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var wrong, alive sync.WaitGroup
	alive.Go(func() { c.keepAlive(ctx) })
	wrong.Go(func() { c.letGoWrong(time.Now().Add(d)) })
	calm := make(chan struct{})
	errs := make(chan error, chaosPods)
	for i := range chaosPods {
		seed := c.rng.Uint64()
		go func() { errs <- c.pod(i, rand.New(rand.NewPCG(seed, 0)), calm) }()
	}
	wrong.Wait()
	err := c.w.disarm()
	close(calm)
	for range chaosPods {
		err = errors.Join(err, <-errs)
	}
	cancel()
	alive.Wait()
	if _, healErr := c.w.heal(0); healErr != nil {
		return errors.Join(err, healErr)
	}
	if err != nil {
		return err
	}
	return c.w.clean()
}

// keepAlive starts containerd whenever it has ended.
func (c *chaos) keepAlive(ctx context.Context) {
	for ctx.Err() == nil {
		died, err := c.w.heal(100 * time.Millisecond)
		if died {
			c.note("containerd had ended; it is started again: %v", err)
		}
	}
}

// letGoWrong arms points, one after the other, and kills processes.
func (c *chaos) letGoWrong(end time.Time) {
	actions := []string{failpoint.Fail, failpoint.Fail, failpoint.Panic, failpoint.Kill, failpoint.Hang, failpoint.Hang, killVMM, killShim, killContainerd}
	for time.Now().Before(end) {
		p, action := c.points[c.rng.IntN(len(c.points))].Point, actions[c.rng.IntN(len(actions))]
		pause := time.Duration(c.rng.IntN(900)) * time.Millisecond
		c.note("%s: %s", p, action)
		armed := (&cell{action: action}).action0()
		if err := c.w.arm(p, armed); err != nil {
			c.note("%v", err)
			return
		}
		if armed == failpoint.Hang {
			go c.atPoint(p, action)
		}
		time.Sleep(pause)
	}
}

// atPoint waits until somebody hangs at a point, and does something meanwhile.
func (c *chaos) atPoint(p failpoint.Point, action string) {
	ctx, cancel := context.WithTimeout(context.Background(), roundTime)
	defer cancel()
	if !c.w.await(ctx, p) {
		return
	}
	if action == failpoint.Hang {
		time.Sleep(hangs)
	} else if err := kill(c.w.Node, action); err != nil {
		c.note("%s at %s: %v", action, p, err)
	}
	if err := c.w.release(p); err != nil {
		c.note("%v", err)
	}
}

// pod brings a pod up and down until it is calm, and then once more.
func (c *chaos) pod(i int, rng *rand.Rand, calm <-chan struct{}) error {
	for last := false; !last; {
		select {
		case <-calm:
			last = true
		default:
		}
		k := newKubelet(c.w.Node, fmt.Sprintf("chaos%d", i), c.w.volume)
		up := level(rng.IntN(int(updated) + 1))
		if last {
			up = updated
		}
		for _, step := range []func() error{func() error { return k.up(up) }, k.down} {
			if err := c.persist(k, step, calm); err != nil {
				return fmt.Errorf("pod %d: %w", i, err)
			}
		}
	}
	return nil
}

// persist does something until it succeeds, which it has to soon when it is calm.
func (c *chaos) persist(k *kubelet, step func() error, calm <-chan struct{}) error {
	var since time.Time
	for {
		began := time.Now()
		err := step()
		if err == nil {
			return nil
		}
		k.mu.Lock()
		k.calls = nil
		k.mu.Unlock()
		select {
		case <-calm:
			if since.IsZero() {
				since = began
			}
			if time.Since(since) > testnode.Scale(calms) {
				return fmt.Errorf("does not succeed although it is calm: %w", err)
			}
		default:
		}
		time.Sleep(200 * time.Millisecond)
	}
}
