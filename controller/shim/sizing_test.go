// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	hostv1 "github.com/cloudhv/containerd-cloudhv/controller/hostapi/v1"
)

// limited makes a container with a memory limit, 0 for none.
func (p *pod) limited(id string, memory int64) error {
	p.t.Helper()
	bundle := p.bundle(id, func(s *specs.Spec) {
		s.Linux.Resources = &specs.LinuxResources{}
		if memory != 0 {
			s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &memory}
		}
	}, "sleep")
	_, err := p.client.Create(testContext(p.t), &taskapi.CreateTaskRequest{ID: id, Bundle: bundle})
	return native(err)
}

// asked are the requests for a size, in words.
func (d *fakeDaemon) asked() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []string
	for _, r := range d.resizes {
		text := ""
		for _, l := range r.Containers {
			text += fmt.Sprintf("%s=%d/%d ", l.ContainerId, l.MemoryBytes, l.CpuQuota)
		}
		if r.ShrinkMemory {
			text += "memory "
		}
		if r.ShrinkVcpus {
			text += "vcpus "
		}
		out = append(out, strings.TrimSpace(text))
	}
	return out
}

func (p *pod) update(id, resources string) error {
	p.t.Helper()
	_, err := p.client.Update(testContext(p.t), &taskapi.UpdateTaskRequest{ID: id, Resources: execSpec(resources)})
	return native(err)
}

// The plugin is told the limits of all containers, once one has any.
func TestLimitsAreTold(t *testing.T) {
	t.Parallel()
	p, ctx := newPod(t), testContext(t)
	require.NoError(t, p.limited("free", 0))
	assert.Empty(t, p.daemon.asked(), "without a limit there is nothing to say")
	require.NoError(t, p.limited("one", 100))
	require.NoError(t, p.limited("two", 200))
	assert.Equal(t, []string{"free=0/0 one=100/0", "free=0/0 one=100/0 two=200/0"}, p.daemon.asked())

	_, err := p.client.Start(ctx, &taskapi.StartRequest{ID: "one"})
	require.NoError(t, err)
	require.NoError(t, p.update("one", `{"memory":{"limit":50},"cpu":{"quota":7,"period":9}}`))
	_, err = p.client.Kill(ctx, &taskapi.KillRequest{ID: "two", Signal: 9})
	require.NoError(t, err)
	p.wait("two", "")
	p.delete("two", "")
	require.NoError(t, p.update("one", `{"cpu":{"quota":8}}`))
	require.NoError(t, p.update("one", `{"memory":{"limit":-1},"cpu":{"quota":-1}}`))
	require.NoError(t, p.update("one", `{"pids":{"limit":5}}`))
	assert.Equal(t, []string{
		"free=0/0 one=50/7 two=200/0 memory vcpus", "free=0/0 one=50/8 vcpus", "free=0/0 one=0/0 memory vcpus",
	}, p.daemon.asked()[2:], "and nothing for an update that is not about them")
}

// A VM that cannot be large enough has no such container.
func TestACreateThatDoesNotFit(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.daemon.resize = func(r *hostv1.ResizeRequest) error {
		if len(r.Containers) > 1 {
			return fmt.Errorf("too much: %w", errdefs.ErrInvalidArgument)
		}
		return nil
	}
	require.NoError(t, p.limited("one", 100))
	err := p.limited("two", 200)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, "too much")
	_, limited := p.svc.sizer.all()
	require.True(t, limited)
	require.Len(t, p.svc.sizer.limits, 1, "what failed does not count")
}

// After an update that fails, on either side, the limits are as before.
func TestAnUpdateThatFails(t *testing.T) {
	t.Parallel()
	p, ctx := newPod(t), testContext(t)
	require.NoError(t, p.limited("c", 100))
	_, err := p.client.Start(ctx, &taskapi.StartRequest{ID: "c"})
	require.NoError(t, err)
	p.daemon.mu.Lock()
	p.daemon.resize = func(*hostv1.ResizeRequest) error {
		return fmt.Errorf("the guest keeps memory in use: %w", errdefs.ErrUnavailable)
	}
	p.daemon.mu.Unlock()
	err = p.update("c", `{"memory":{"limit":50}}`)
	require.ErrorContains(t, err, "the guest keeps memory in use")
	require.Empty(t, p.guest.updated, "the container keeps its limit")
	require.EqualValues(t, 100, p.svc.sizer.limits["c"].MemoryBytes)

	p.daemon.mu.Lock()
	p.daemon.resize = nil
	p.daemon.mu.Unlock()
	p.guest.failing("Update", fmt.Errorf("in use: %w", errdefs.ErrFailedPrecondition))
	err = p.update("c", `{"memory":{"limit":50}}`)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	asked := p.daemon.asked()
	require.Equal(t, []string{"c=50/0 memory", "c=100/0 memory"}, asked[len(asked)-2:], "the VM is made as large as it was")
}

// Requests come one after the other, and the last one has them all.
func TestLimitsAtOnce(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	var wg sync.WaitGroup
	for i := range 8 {
		bundle := p.bundle(fmt.Sprint("c", i), func(s *specs.Spec) {
			limit := int64(i + 1)
			s.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}
		}, "sleep")
		wg.Go(func() {
			_, err := p.client.Create(testContext(t), &taskapi.CreateTaskRequest{ID: fmt.Sprint("c", i), Bundle: bundle})
			assert.NoError(t, err)
		})
	}
	wg.Wait()
	p.daemon.mu.Lock()
	defer p.daemon.mu.Unlock()
	require.Len(t, p.daemon.resizes, 8)
	require.Len(t, p.daemon.resizes[7].Containers, 8)
}
