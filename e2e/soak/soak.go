// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

const (
	// settleTime is when nothing ends by itself any more, after the last pod.
	settleTime = 10 * time.Second
	// censusLimit is how long what ends by itself may take later.
	censusLimit = time.Minute
	// looks is how often it is looked at what there is while pods run one after the other.
	looks = 10
	// maxFailures ends a run in which too much goes wrong.
	maxFailures = 20
	// longestStay is for how long a pod of the churn stays, at the most.
	longestStay = 8 * time.Second
	// poolLimit is how long the pool may take to be full again.
	poolLimit = 5 * time.Minute
	// tellEvery is how often the churn tells how it goes.
	tellEvery = time.Minute
)

// soak is a run.
type soak struct {
	node                *testnode.Node
	out                 io.Writer
	pods, alive, warmUp int
	churn               time.Duration

	first testnode.Census
	rests []rest

	mu       sync.Mutex
	done     int
	failures []error
	slowest  time.Duration
}

// run goes through it all. It fails if a pod has failed or if something has grown.
func (s *soak) run(ctx context.Context) error {
	s.say("%d pods to warm up", s.warmUp)
	s.row(ctx, s.warmUp)
	if err := s.begin(ctx); err != nil {
		return err
	}
	errs := []error{}
	for i := range looks {
		s.row(ctx, s.pods*(i+1)/looks-s.pods*i/looks)
		if err := s.rest(ctx, fmt.Sprintf("%d in a row", s.pods*(i+1)/looks)); err != nil {
			errs = append(errs, err)
			break
		}
		if s.tooMany() || ctx.Err() != nil {
			break
		}
	}
	if s.churn > 0 && len(errs) == 0 && !s.tooMany() && ctx.Err() == nil {
		s.comeAndGo(ctx)
		errs = append(errs, s.rest(ctx, fmt.Sprintf("%v of churn", s.churn)))
	}
	fmt.Fprint(s.out, table(s.rests))
	errs = append(errs, s.failures...)
	if len(s.rests) > 0 {
		errs = append(errs, s.rests[len(s.rests)-1].grown(s.rests[0])...)
	}
	return errors.Join(append(errs, ctx.Err())...)
}

// begin takes the census that all later ones are compared with.
func (s *soak) begin(ctx context.Context) error {
	if err := s.awaitPool(ctx); err != nil {
		return err
	}
	// What the last pod has left behind to end by itself has ended then.
	timer := time.NewTimer(testnode.Scale(settleTime))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	var err error
	if s.first, err = s.node.Census(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	s.done, s.slowest = 0, 0
	s.mu.Unlock()
	return s.rest(ctx, "the beginning")
}

func (s *soak) awaitPool(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, testnode.Scale(poolLimit))
	defer cancel()
	return s.node.AwaitPool(ctx, ready)
}

// rest waits until nothing runs any more and notes what there is. It fails if the
// census is not as at the beginning.
func (s *soak) rest(ctx context.Context, when string) error {
	if err := s.awaitPool(ctx); err != nil {
		return err
	}
	if err := s.awaitCensus(ctx); err != nil {
		return fmt.Errorf("%s: %w", when, err)
	}
	u, err := s.node.Usage(ctx)
	if err != nil {
		return err
	}
	r := rest{when: when, containerd: u, at: time.Now()}
	for dir, size := range map[string]*int64{s.node.StateDir(): &r.state, s.node.CacheDir(): &r.cache, s.node.Dir("root"): &r.root} {
		if *size, err = allocated(dir); err != nil {
			return err
		}
	}
	s.mu.Lock()
	r.done, r.failed, r.slowest = s.done, len(s.failures), s.slowest
	s.mu.Unlock()
	s.rests = append(s.rests, r)
	s.say("%s: %s", when, r)
	return nil
}

// awaitCensus waits until there is no more of anything than at the beginning.
func (s *soak) awaitCensus(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, testnode.Scale(censusLimit))
	defer cancel()
	return testnode.Eventually(ctx, func(ctx context.Context) error {
		now, err := s.node.Census(ctx)
		if err != nil {
			return err
		}
		return grown(now.Diff(s.first))
	})
}

// row runs pods one after the other.
func (s *soak) row(ctx context.Context, count int) {
	for range count {
		if ctx.Err() != nil || s.tooMany() {
			return
		}
		took, err := s.life(ctx, 0)
		s.note(ctx, took, err)
	}
}

// comeAndGo keeps pods alive, each of which stays for a while.
func (s *soak) comeAndGo(ctx context.Context) {
	end := time.Now().Add(s.churn)
	var wg sync.WaitGroup
	for range s.alive {
		wg.Go(func() {
			for time.Now().Before(end) && ctx.Err() == nil && !s.tooMany() {
				took, err := s.life(ctx, rand.N(longestStay))
				s.note(ctx, took, err)
			}
		})
	}
	stop := make(chan struct{})
	var teller sync.WaitGroup
	teller.Go(func() {
		ticker := time.NewTicker(tellEvery)
		defer ticker.Stop()
		for {
			select {
			case <-ticker.C:
				s.mu.Lock()
				done, failed := s.done, len(s.failures)
				s.mu.Unlock()
				s.say("churn: %d pods, %d failed, %v to go", done, failed, time.Until(end).Round(time.Second))
			case <-stop:
				return
			}
		}
	})
	wg.Wait()
	close(stop)
	teller.Wait()
}

// note counts a pod, unless the run was broken off.
func (s *soak) note(ctx context.Context, took time.Duration, err error) {
	if ctx.Err() != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.done++
	s.slowest = max(s.slowest, took)
	if err != nil {
		s.failures = append(s.failures, fmt.Errorf("pod %d: %w", s.done, err))
		fmt.Fprintln(s.out, s.failures[len(s.failures)-1])
	}
}

func (s *soak) tooMany() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.failures) >= maxFailures
}

func (s *soak) say(format string, args ...any) {
	fmt.Fprintf(s.out, time.Now().Format(time.TimeOnly)+" "+format+"\n", args...)
}

// hello is what each container says.
const hello = "hello"

// life is a pod's from beginning to end, and how long it took until its container
// ran: it writes to its log and answers an exec, and stays for a while.
func (s *soak) life(ctx context.Context, stay time.Duration) (took time.Duration, retErr error) {
	n := s.node
	cfg := n.PodConfig("soak")
	defer func() { retErr = errors.Join(retErr, os.RemoveAll(cfg.GetLogDirectory())) }()
	began := time.Now()
	id, err := n.RunPod(ctx, cfg, testnode.CloudHV)
	if err != nil {
		return 0, err
	}
	defer func() {
		// What was begun is ended also when the run is broken off.
		end := context.WithoutCancel(ctx)
		retErr = errors.Join(retErr, n.StopPod(end, id), n.RemovePod(end, id))
	}()
	c, err := n.CreateContainer(ctx, id, cfg, testnode.ContainerConfig("c", testimage.BusyboxRef, "/bin/sh", "-c", "echo "+hello+"; exec sleep 1000000"))
	if err != nil {
		return 0, err
	}
	if err := n.StartContainer(ctx, c); err != nil {
		return 0, err
	}
	took = time.Since(began)
	out, errOut, code, err := n.ExecSync(ctx, c, "/bin/sh", "-c", "echo more > /tmp/file && cat /tmp/file")
	if err != nil {
		return took, err
	}
	if out != "more\n" || code != 0 {
		return took, fmt.Errorf("an exec answers %q, %q, %d: %w", out, errOut, code, errdefs.ErrUnknown)
	}
	timer := time.NewTimer(stay)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		return took, ctx.Err()
	}
	return took, s.wrote(ctx, filepath.Join(cfg.GetLogDirectory(), "c.log"))
}

// wrote waits for the container's line in its log.
func (s *soak) wrote(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, testnode.Scale(time.Minute))
	defer cancel()
	return testnode.Eventually(ctx, func(context.Context) error {
		data, err := os.ReadFile(path)
		if err == nil && !strings.HasSuffix(string(data), " stdout F "+hello+"\n") {
			err = fmt.Errorf("the container's log is %q: %w", data, errdefs.ErrUnavailable)
		}
		return err
	})
}
