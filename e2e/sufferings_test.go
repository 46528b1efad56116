// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// suffering is for how long a node is looked at beside a hostile guest.
	suffering = 6 * time.Second
	// worse is how many times as long others' calls may take as beside a busy guest, at the
	// median, and slack what is granted besides.
	worse = 3
	slack = 100 * time.Millisecond
	// share is what containerd may take of a processor more than beside a busy guest.
	share = 0.35
)

// sufferings are how others fare beside a pod.
type sufferings struct {
	exec, status, list []time.Duration
	// busy is how much of a processor containerd took.
	busy float64
}

func (s sufferings) String() string {
	text := fmt.Sprintf("containerd took %.0f %% of a processor", 100*s.busy)
	for _, c := range []struct {
		name string
		took []time.Duration
	}{{"exec", s.exec}, {"Status", s.status}, {"PodSandboxStatus", s.list}} {
		text += fmt.Sprintf(", %s %s and at most %s (%d)", c.name,
			median(c.took).Round(100*time.Microsecond), slices.Max(c.took).Round(time.Millisecond), len(c.took))
	}
	return text
}

func median(all []time.Duration) time.Duration {
	sorted := slices.Sorted(slices.Values(all))
	return sorted[len(sorted)/2]
}

// measure executes something in the other pod and asks containerd, over and over.
func (h *victims) measure(t *testing.T) (s sufferings) {
	t.Helper()
	ctx := testContext(t)
	timed := func(to *[]time.Duration, f func() error) {
		began := time.Now()
		require.NoError(t, f())
		*to = append(*to, time.Since(began))
	}
	began, ticks := time.Now(), ticksOf(t, h.n.Pid())
	for time.Since(began) < suffering {
		timed(&s.exec, func() error {
			_, _, _, err := h.n.ExecSync(ctx, h.other.id, "true")
			return err
		})
		for range 3 {
			timed(&s.status, func() error {
				_, err := h.n.Runtime().Status(ctx, &runtimeapi.StatusRequest{})
				return err
			})
			timed(&s.list, func() error {
				_, err := h.n.Runtime().PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: h.other.pod.id})
				return err
			})
			time.Sleep(20 * time.Millisecond)
		}
	}
	s.busy = float64(ticksOf(t, h.n.Pid())-ticks) / 100 / time.Since(began).Seconds()
	return s
}

// compare fails if others fared much worse than beside a guest that was only busy.
func (h *victims) compare(t *testing.T, a attack, got sufferings) {
	t.Helper()
	require.NotEmpty(t, h.usual.exec, "nothing to compare with: the attack spin has to run too")
	for name, m := range map[string][2][]time.Duration{
		"exec": {got.exec, h.usual.exec}, "Status": {got.status, h.usual.status}, "PodSandboxStatus": {got.list, h.usual.list},
	} {
		assert.Less(t, median(m[0]), worse*median(m[1])+slack, "%s of others", name)
	}
	assert.Less(t, got.busy, h.usual.busy+share+a.busy, "containerd's processor time")
}

// ticksOf is the processor time of a process, in hundredths of a second.
func ticksOf(t *testing.T, pid int) (ticks int64) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	require.NoError(t, err)
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(f, 10, 64)
		require.NoError(t, err)
		ticks += n
	}
	return ticks
}
