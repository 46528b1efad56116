// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"
)

// damageLog notes which sandboxes a log says to be damaged.
type damageLog struct {
	mu   sync.Mutex
	said map[string]int
}

func (*damageLog) Levels() []logrus.Level { return []logrus.Level{logrus.ErrorLevel} }

func (d *damageLog) Fire(e *logrus.Entry) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if id, ok := e.Data["sandbox"].(string); ok && e.Message == "a sandbox's record is damaged; its pod is ended" {
		d.said[id]++
	}
	return nil
}

// TestEveryPrefixOfARecord: whatever part of a record has reached the disk when power
// is lost, it costs that pod only, which the log names. Of the file that a record is
// written to first nothing is read.
func TestEveryPrefixOfARecord(t *testing.T) {
	n := newNode(t)
	n.run("lives")
	whole, err := os.ReadFile(filepath.Join(n.cfg.StateDir, "lives", recordFile))
	require.NoError(t, err)
	id := func(i int) string { return fmt.Sprintf("cut%04d", i) }
	for i := range whole {
		dir := filepath.Join(n.cfg.StateDir, id(i))
		require.NoError(t, os.Mkdir(dir, 0o700))
		require.NoError(t, os.WriteFile(filepath.Join(dir, recordFile), whole[:i], 0o600))
		// As atomicfile calls it.
		require.NoError(t, os.WriteFile(filepath.Join(n.cfg.StateDir, "lives", fmt.Sprint(1000000+i)), whole[:i], 0o600))
		// No record was there before: the pod was being created.
		dir = filepath.Join(n.cfg.StateDir, fmt.Sprintf("new%04d", i))
		require.NoError(t, os.Mkdir(dir, 0o700))
		require.NoError(t, os.WriteFile(filepath.Join(dir, "1000000"), whole[:i], 0o600))
	}
	said := &damageLog{said: map[string]int{}}
	logger := logrus.New()
	logger.SetOutput(t.Output())
	logger.AddHook(said)
	n.letGo()
	n.Controller = n.controller()
	n.cfg.RecoverTimeout = time.Minute
	require.NoError(t, n.Recover(log.WithLogger(t.Context(), logrus.NewEntry(logger))))

	require.Len(t, said.said, len(whole))
	for i := range whole {
		require.Equal(t, 1, said.said[id(i)], "the log names it once")
		_, err := n.Status(n.ctx(), id(i), false)
		require.ErrorIs(t, err, errdefs.ErrNotFound)
	}
	left, err := os.ReadDir(n.cfg.StateDir)
	require.NoError(t, err)
	names := []string{}
	for _, e := range left {
		names = append(names, e.Name())
	}
	require.ElementsMatch(t, []string{damagedDir, "lives"}, names)
	kept, err := os.ReadDir(filepath.Join(n.cfg.StateDir, damagedDir))
	require.NoError(t, err)
	require.Len(t, kept, maxDamaged)
	state, _ := n.status("lives")
	require.Equal(t, ready, state)
	require.NoError(t, n.Shutdown(n.ctx(), "lives"))
	require.NoError(t, os.RemoveAll(filepath.Join(n.cfg.StateDir, damagedDir)))
	n.requireNothing()
}

// TestRecoverInParallel: pods are taken up several at a time, and never more, so that
// a hundred VMMs that are slow to answer do not add up.
func TestRecoverInParallel(t *testing.T) {
	const pods, answer = 100, 50 * time.Millisecond
	n := newNode(t)
	for i := range pods {
		n.run(fmt.Sprintf("p%03d", i))
	}
	var now, most atomic.Int32
	n.driver.onAttach = func(ctx context.Context) {
		if m := now.Add(1); m > most.Load() {
			most.Store(m) // too small now and then, by a race that the next one mends
		}
		defer now.Add(-1)
		select {
		case <-time.After(answer):
		case <-ctx.Done():
		}
	}
	n.letGo()
	n.Controller = n.controller()
	began := time.Now()
	require.NoError(t, n.Recover(t.Context()))
	took := time.Since(began)
	t.Logf("%d pods whose VMMs answer after %v: %v, %v a pod", pods, answer, took, took/pods)
	require.Less(t, took, pods*answer/2, "one after the other they would take %v", pods*answer)
	require.LessOrEqual(t, most.Load(), int32(recoverParallel))
	require.Greater(t, most.Load(), int32(recoverParallel/2))
	n.driver.onAttach = nil
	for _, p := range n.all() {
		state, _ := n.status(p.id)
		require.Equal(t, ready, state)
		require.NoError(t, n.Shutdown(n.ctx(), p.id))
	}
	n.requireNothing()
}
