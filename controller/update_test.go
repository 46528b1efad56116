// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"encoding/json"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/anypb"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	hostv1 "github.com/cloudhv/containerd-cloudhv/controller/hostapi/v1"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// extension is how CRI passes updated resources; the type's name is its own.
func extension(t *testing.T, res *runtime.LinuxContainerResources) sandbox.Sandbox {
	t.Helper()
	data, err := json.Marshal(updatedResources{Resources: res})
	require.NoError(t, err)
	return sandbox.Sandbox{Extensions: map[string]typeurl.Any{resourcesKey: criAny(data)}}
}

func criAny(data []byte) typeurl.Any {
	return &anypb.Any{TypeUrl: "github.com/containerd/cri/pkg/server/podsandbox/UpdatedResources", Value: data}
}

func TestUpdateResizesTheVM(t *testing.T) {
	n := newNode(t)
	p := n.run("a")
	m := n.driver.only(t)
	update := func(memory, quota int64) error {
		return n.Update(n.ctx(), "a", extension(t, &runtime.LinuxContainerResources{MemoryLimitInBytes: memory, CpuQuota: quota}), "extensions")
	}
	require.NoError(t, update(1024*mib, 300000))
	require.Equal(t, vmm.Size{VCPUs: 3, MemoryBytes: 1088 * mib}, m.size)
	require.Equal(t, m.size, p.snapshot().Size)
	require.Len(t, m.resized, 1, "the guest follows a growth")

	require.NoError(t, update(1024*mib, 300000))
	require.Len(t, m.resized, 1, "nothing to do")

	require.NoError(t, update(512*mib, 400000))
	require.Equal(t, vmm.Size{VCPUs: 4, MemoryBytes: 576 * mib}, m.size)
	require.Equal(t, vmm.Size{VCPUs: 4, MemoryBytes: 576 * mib}, p.snapshot().Size)

	require.NoError(t, update(0, 100000))
	require.Equal(t, vmm.Size{VCPUs: 1, MemoryBytes: 576 * mib}, m.size, "what is not said stays")

	require.ErrorIs(t, update(100<<30, 0), errdefs.ErrInvalidArgument)
	require.Equal(t, vmm.Size{VCPUs: 1, MemoryBytes: 576 * mib}, m.size)
	require.NoError(t, update(0, 900000))
	require.Equal(t, vmm.Size{VCPUs: 4, MemoryBytes: 576 * mib}, m.size, "as many as there may be")
	require.NoError(t, update(0, 100000))

	n.driver.vm.resize = errInjected
	require.ErrorIs(t, update(1024*mib, 0), errInjected)
	n.driver.vm.resize = nil
	m.agent.resize = errdefs.ErrUnavailable
	require.ErrorIs(t, update(128*mib, 0), errdefs.ErrUnavailable)
	require.Equal(t, int64(576*mib), p.snapshot().Size.MemoryBytes)

	require.NoError(t, n.Update(n.ctx(), "a", sandbox.Sandbox{}, "labels"))
	require.NoError(t, n.Update(n.ctx(), "a", extension(t, nil), "labels"))
	bad := sandbox.Sandbox{Extensions: map[string]typeurl.Any{resourcesKey: criAny([]byte("{"))}}
	require.ErrorIs(t, n.Update(n.ctx(), "a", bad), errdefs.ErrInvalidArgument)
	m.agent.resize = nil
	require.NoError(t, n.Stop(n.ctx(), "a"))
	require.ErrorIs(t, update(1024*mib, 0), errdefs.ErrUnavailable)
}

// A shrink that the guest does not give back is an error, after which all is as it was.
func TestUpdateThatTheGuestRefuses(t *testing.T) {
	n := newNode(t)
	p := n.run("a")
	m := n.driver.only(t)
	update := func(memory, quota int64) error {
		return n.Update(n.ctx(), "a", extension(t, cri(memory, quota, 0)), "extensions")
	}
	require.NoError(t, update(1024*mib, 200000))
	before := vmm.Size{VCPUs: 2, MemoryBytes: 1088 * mib}
	require.Equal(t, before, m.size)

	n.driver.vm.keeps = 700 * mib
	err := update(512*mib, 100000)
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	require.ErrorContains(t, err, "the guest keeps memory in use")
	require.Equal(t, before, m.size, "the VM has what it had")
	require.EqualValues(t, 2, m.resized[len(m.resized)-1].GetVcpus())
	rec := p.snapshot()
	require.Equal(t, before, rec.Size)
	require.EqualValues(t, 1024*mib, rec.sizing().Memory)
	require.False(t, rec.Resizing)

	// One that the guest could not do without is not even asked of the VMM.
	n.driver.vm.keeps = 0
	m.agent.resize = errdefs.ErrFailedPrecondition
	asked := m.asked
	err = update(512*mib, 0)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.ErrorContains(t, err, "the guest keeps memory in use")
	require.EqualValues(t, 512*mib+64*mib, m.resized[len(m.resized)-1].GetShrinkToBytes())
	require.Equal(t, asked, m.asked)
	require.Equal(t, before, p.snapshot().Size)
	m.agent.resize = nil

	// A little that the guest's kernel cannot give is told, and no error.
	n.driver.vm.keeps = 590 * mib
	require.NoError(t, update(512*mib, 100000))
	require.Equal(t, vmm.Size{VCPUs: 1, MemoryBytes: 590 * mib}, m.size)
	require.Equal(t, m.size, p.snapshot().Size)
	// And it is asked for again when there is occasion.
	n.driver.vm.keeps = 0
	require.NoError(t, update(512*mib, 100000))
	require.Equal(t, vmm.Size{VCPUs: 1, MemoryBytes: 576 * mib}, m.size)
}

// After a crash in the middle the VM gets the size that the record says.
func TestUpdateCutShort(t *testing.T) {
	n := newNode(t)
	n.run("a")
	m := n.driver.only(t)
	asked := m.asked
	rewrite(n, "a", func(r *record) { r.Resizing = true })
	n.restart()
	require.Eventually(t, func() bool {
		p, err := n.get("a")
		if err != nil {
			return false
		}
		rec := p.snapshot()
		return !rec.Resizing
	}, 10*time.Second, time.Millisecond)
	m.mu.Lock()
	defer m.mu.Unlock()
	require.Greater(t, m.asked, asked)
	require.Equal(t, vmm.Size{VCPUs: 1, MemoryBytes: 256 * mib}, m.size)
}

// resizeFor asks as a shim does.
func (n *node) resizeFor(id string, shrink bool, containers ...limits) error {
	req := &hostv1.ResizeRequest{SandboxId: id, ShrinkMemory: shrink, ShrinkVcpus: shrink}
	for _, l := range containers {
		req.Containers = append(req.Containers, &hostv1.Limits{MemoryBytes: l.memory, CpuQuota: l.quota, CpuPeriod: l.period})
	}
	_, err := n.HostService().Resize(n.ctx(), req)
	return errgrpc.ToNative(err)
}

func TestContainersResizeTheVM(t *testing.T) {
	n := newNode(t)
	n.run("a")
	m := n.driver.only(t)
	start := vmm.Size{VCPUs: 1, MemoryBytes: 256 * mib}
	require.NoError(t, n.resizeFor("a", false, limits{memory: 100 * mib}))
	require.Equal(t, start, m.size, "there is room")
	one := limits{memory: 300 * mib, quota: 200000}
	require.NoError(t, n.resizeFor("a", false, one))
	require.Equal(t, vmm.Size{VCPUs: 2, MemoryBytes: 364 * mib}, m.size)
	require.NoError(t, n.resizeFor("a", false))
	require.Equal(t, vmm.Size{VCPUs: 2, MemoryBytes: 364 * mib}, m.size, "what goes gives nothing back until that is asked for")
	require.NoError(t, n.resizeFor("a", true))
	require.Equal(t, start, m.size)

	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			if err := n.resizeFor("a", false, limits{memory: int64(i+1) * 100 * mib}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	require.EqualValues(t, 864*mib, m.size.MemoryBytes, "the largest")

	require.ErrorIs(t, n.resizeFor("a", false, limits{memory: 3 << 30}), errdefs.ErrInvalidArgument)
	require.ErrorIs(t, n.resizeFor("b", false, one), errdefs.ErrNotFound)

	// The pod's own limit, once there is one, is what counts.
	require.NoError(t, n.Update(n.ctx(), "a", extension(t, cri(512*mib, 0, 0)), "extensions"))
	require.NoError(t, n.resizeFor("a", true, limits{memory: 1 << 30, quota: 200000}))
	require.Equal(t, vmm.Size{VCPUs: 2, MemoryBytes: 576 * mib}, m.size)

	require.NoError(t, n.Stop(n.ctx(), "a"))
	require.ErrorIs(t, n.resizeFor("a", false, one), errdefs.ErrUnavailable)
}

// A VM without virtio-mem is booted with its memory, which then stays.
func TestFixedMemory(t *testing.T) {
	n := newNode(t)
	require.NoError(t, n.Create(n.ctx(), sandbox.Sandbox{ID: "a"}, sandbox.WithOptions(&runtime.PodSandboxConfig{
		Annotations: map[string]string{"io.cloudhv.enable_virtio_mem": "false", "io.cloudhv.default_memory": "300MiB"},
	})))
	_, err := n.Start(n.ctx(), "a")
	require.NoError(t, err)
	m := n.driver.only(t)
	require.EqualValues(t, 300*mib, m.cfg.Size.MemoryBytes)
	require.EqualValues(t, 300*mib, m.cfg.Max.MemoryBytes)
	err = n.resizeFor("a", false, limits{memory: 512 * mib})
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.ErrorContains(t, err, "io.cloudhv.enable_virtio_mem")
	require.NoError(t, n.resizeFor("a", false, limits{memory: 100 * mib, quota: 300000}))
	require.Equal(t, vmm.Size{VCPUs: 3, MemoryBytes: 300 * mib}, m.size)
}
