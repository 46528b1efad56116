// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"fmt"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

const (
	mib = 1 << 20
	// base and overhead are base_memory and memory_overhead.
	base, overhead = 512 * mib, 64 * mib
	// memoryKept is what a guest may keep of memory that it is to give back.
	memoryKept = 32 * mib
	// kernelTakes is what a guest's kernel takes for itself before it counts.
	kernelTakes = 64 * mib
)

// hostVCPUs is what a pod without a CPU limit has.
func hostVCPUs() int { return min(runtime.NumCPU(), 64) }

// resize gives the pod other limits; 0 is none.
func (p *pod) resize(memory, quota int64) error {
	p.t.Helper()
	_, err := p.n.Runtime().UpdatePodSandboxResources(testContext(p.t), &runtimeapi.UpdatePodSandboxResourcesRequest{
		PodSandboxId: p.id,
		Resources:    &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: memory, CpuQuota: quota, CpuPeriod: 100000},
	})
	return err
}

// update gives the container other limits; 0 leaves them.
func (c *container) update(memory, quota int64) error {
	c.t.Helper()
	_, err := c.n.Runtime().UpdateContainerResources(testContext(c.t), &runtimeapi.UpdateContainerResourcesRequest{
		ContainerId: c.id, Linux: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: memory, CpuQuota: quota, CpuPeriod: 100000},
	})
	return err
}

// requireSize compares the VM as its status tells it and as a container sees it.
func (c *container) requireSize(vcpus int, memory int64) {
	c.t.Helper()
	i := c.info()
	require.Equal(c.t, vcpus, i.VCPUs)
	require.GreaterOrEqual(c.t, i.MemoryBytes, memory)
	require.LessOrEqual(c.t, i.MemoryBytes, memory+memoryKept)
	total, cpus := c.machine()
	require.Equal(c.t, vcpus, cpus)
	require.LessOrEqual(c.t, total, i.MemoryBytes)
	require.GreaterOrEqual(c.t, total, i.MemoryBytes-kernelTakes)
}

// cgroup reads a file of the container's cgroup.
func (c *container) cgroup(file string) string {
	c.t.Helper()
	return strings.TrimSpace(c.sh("cat /sys/fs/cgroup/" + file))
}

// limited is the configuration of a container with a memory limit.
func limited(name string, memory int64, args ...string) *runtimeapi.ContainerConfig {
	cfg := idleConfig(name)
	if len(args) > 0 {
		cfg = helperConfig(name, args...)
		cfg.Stdin = true
	}
	cfg.Linux.Resources.MemoryLimitInBytes = memory
	return cfg
}

// TestResizePod grows and shrinks a running pod.
func TestResizePod(t *testing.T) {
	requireCloudHV(t)
	p := newPod(t, testnode.CloudHV)
	c := p.idle("c")
	c.requireSize(hostVCPUs(), base)
	for _, s := range []struct {
		memory, quota int64
		vcpus         int
	}{{1024 * mib, 100000, 1}, {1536 * mib, 0, 1}, {768 * mib, 200000, 2}, {100 * mib, 50000, 1}} {
		if s.vcpus > hostVCPUs() {
			continue
		}
		began := time.Now()
		require.NoError(t, p.resize(s.memory, s.quota))
		t.Logf("to %d MiB and %d vCPUs in %v", s.memory/mib, s.vcpus, time.Since(began).Round(time.Millisecond))
		c.requireSize(s.vcpus, max(base, s.memory+overhead))
		if s.memory > base {
			// What has come can be used.
			require.Equal(t, "ok\n", c.exec(testimage.HelperPath, "hold", strconv.FormatInt(s.memory-256*mib, 10)))
		}
	}
	err := p.resize(10<<40, 0)
	require.ErrorContains(t, err, "must be")
	require.ErrorContains(t, err, "(max_memory")
	c.requireSize(1, base)
	// A limit of processor time is no promise: there are as many as there may be.
	require.NoError(t, p.resize(0, 4000*100000))
	c.requireSize(hostVCPUs(), base)
	require.NoError(t, p.resize(0, 50000))
	c.requireSize(1, base)
}

// TestContainersSizeTheVM is about limits of containers in a pod that has none.
func TestContainersSizeTheVM(t *testing.T) {
	requireCloudHV(t)
	p := newPod(t, testnode.CloudHV)
	one := p.start(limited("one", 700*mib))
	one.awaitLine("ready")
	one.requireSize(hostVCPUs(), 764*mib)
	require.Equal(t, strconv.Itoa(700*mib), one.cgroup("memory.max"))
	two := p.idle("two")
	two.requireSize(hostVCPUs(), (700+512)*mib)

	require.NoError(t, one.update(900*mib, 50000))
	one.requireSize(hostVCPUs(), (900+512)*mib)
	require.Equal(t, strconv.Itoa(900*mib), one.cgroup("memory.max"))
	require.Equal(t, "50000 100000", one.cgroup("cpu.max"))
	cl := cli{t: t, n: p.n, ctx: testContext(t)}
	cl.run("update", "--memory", strconv.Itoa(200*mib), one.id)
	one.requireSize(hostVCPUs(), (200+512)*mib)
	require.Equal(t, strconv.Itoa(200*mib), one.cgroup("memory.max"))

	err := one.update(1<<40, 0)
	require.ErrorContains(t, err, "max_memory")
	require.Equal(t, strconv.Itoa(200*mib), one.cgroup("memory.max"))
	one.requireSize(hostVCPUs(), (200+512)*mib)

	// One that is gone does not count, but gives nothing back by itself.
	require.NoError(t, p.n.StopContainer(testContext(t), two.id, time.Minute))
	require.NoError(t, p.n.RemoveContainer(testContext(t), two.id))
	one.requireSize(hostVCPUs(), (200+512)*mib)
	require.NoError(t, one.update(0, 60000))
	one.requireSize(hostVCPUs(), (200+512)*mib)
	require.NoError(t, one.update(190*mib, 0))
	one.requireSize(hostVCPUs(), base)

	id, err := p.n.CreateContainer(testContext(t), p.id, p.cfg, limited("huge", 1<<40))
	if err == nil {
		err = p.n.StartContainer(testContext(t), id)
	}
	require.ErrorContains(t, err, "max_memory")
	one.requireSize(hostVCPUs(), base)
}

// TestShrinkRefused holds the memory that is to be given back: that is an error, and
// all is as it was.
func TestShrinkRefused(t *testing.T) {
	requireCloudHV(t)
	p := newPod(t, testnode.CloudHV)
	require.NoError(t, p.resize(1536*mib, 0))
	c := p.start(limited("c", 1400*mib, "hold", strconv.Itoa(1100*mib)))
	c.awaitLine("ok")
	before := p.info()
	err := p.resize(256*mib, 0)
	require.ErrorContains(t, err, "the guest keeps memory in use")
	c.requireSize(before.VCPUs, before.MemoryBytes)
	require.Equal(t, before.MemoryBytes, p.info().MemoryBytes)

	err = c.update(300*mib, 0)
	require.ErrorContains(t, err, "in use")
	require.Equal(t, strconv.Itoa(1400*mib), c.cgroup("memory.max"))
	require.EqualValues(t, 1400*mib, c.status().GetResources().GetLinux().GetMemoryLimitInBytes())
	require.Equal(t, runtimeapi.ContainerState_CONTAINER_RUNNING, c.status().GetState())

	// Page cache is not in use.
	other := p.start(limited("other", 600*mib))
	other.awaitLine("ready")
	other.sh("dd if=/dev/zero of=/file bs=1M count=150 2>/dev/null && sync && cat /file >/dev/null")
	require.NoError(t, other.update(64*mib, 0))
	require.Equal(t, strconv.Itoa(64*mib), other.cgroup("memory.max"))

	require.NoError(t, p.n.StopContainer(testContext(t), c.id, 0))
	require.NoError(t, p.resize(256*mib, 0))
	other.requireSize(before.VCPUs, base)
}

// TestResizesAtOnce ends with what was asked last.
func TestResizesAtOnce(t *testing.T) {
	requireCloudHV(t)
	p := newPod(t, testnode.CloudHV)
	c := p.start(limited("c", 128*mib))
	c.awaitLine("ready")
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			assert.NoError(t, p.resize(int64(600+100*i)*mib, 100000))
			assert.NoError(t, c.update(int64(64+10*i)*mib, 0))
		})
	}
	wg.Wait()
	got := p.info()
	require.Contains(t, []int64{664 * mib, 764 * mib, 864 * mib, 964 * mib}, got.MemoryBytes/(4*mib)*(4*mib))
	c.requireSize(1, got.MemoryBytes)
	require.NoError(t, p.resize(1024*mib, 0))
	c.requireSize(1, 1088*mib)
}

// TestResizeOfALostPod fails with what happened.
func TestResizeOfALostPod(t *testing.T) {
	requireCloudHV(t)
	p := newPod(t, testnode.CloudHV)
	c := p.start(limited("c", 128*mib))
	c.awaitLine("ready")
	require.NoError(t, syscall.Kill(p.info().VMMPid, syscall.SIGKILL))
	p.awaitNotReady()
	require.ErrorContains(t, p.resize(1024*mib, 0), "stop")
	require.EqualValues(t, 512*mib, p.info().MemoryBytes)
}

// TestOwnBoots are pods for which no VM of the pool will do.
func TestOwnBoots(t *testing.T) {
	requireCloudHV(t)
	t.Run("kernel parameters", func(t *testing.T) {
		p := newPod(t, testnode.CloudHV, func(cfg *runtimeapi.PodSandboxConfig) {
			cfg.Annotations = map[string]string{"io.cloudhv.kernel_params": "chv.test=1 loglevel=4"}
		})
		require.Equal(t, "cold", p.info().Outcome)
		c := p.idle("c")
		require.Contains(t, c.sh("cat /proc/cmdline"), " chv.test=1 loglevel=4")
		c.requireSize(hostVCPUs(), base)
	})
	t.Run("no virtio-mem", func(t *testing.T) {
		p := newPod(t, testnode.CloudHV, func(cfg *runtimeapi.PodSandboxConfig) {
			cfg.Annotations = map[string]string{"io.katacontainers.config.hypervisor.enable_virtio_mem": "false", "io.cloudhv.default_memory": "700MiB"}
		})
		require.Equal(t, "cold", p.info().Outcome)
		c := p.idle("c")
		c.requireSize(hostVCPUs(), 700*mib)
		require.ErrorContains(t, p.resize(1024*mib, 0), "enable_virtio_mem")
		id, err := p.n.CreateContainer(testContext(t), p.id, p.cfg, limited("huge", 1024*mib))
		if err == nil {
			err = p.n.StartContainer(testContext(t), id)
		}
		require.ErrorContains(t, err, "enable_virtio_mem")
		require.NoError(t, p.resize(0, 100000))
		c.requireSize(1, 700*mib)
	})
}

// TestAnnotations checks the pod's size by annotations of ours and of Kata's.
func TestAnnotations(t *testing.T) {
	requireCloudHV(t)
	const kata, long = "io.katacontainers.config.hypervisor.", "io.cloudhv.config.hypervisor."
	for name, tc := range map[string]struct {
		annotations map[string]string
		vcpus       int
		memory      int64
		max         int64
	}{
		"none":          {nil, hostVCPUs(), 512 * mib, 0},
		"ours":          {map[string]string{"io.cloudhv.default_vcpus": "1", "io.cloudhv.default_memory": "768MiB", "io.cloudhv.default_maxmemory": "1GiB"}, 1, 768 * mib, 1024 * mib},
		"of Kata":       {map[string]string{kata + "default_vcpus": "1", kata + "default_memory": "640", kata + "default_max_vcpus": "1"}, 1, 640 * mib, 0},
		"the long form": {map[string]string{long + "default_vcpus": "1", long + "default_memory": "640", long + "memory_limit": "800"}, 1, 640 * mib, 800 * mib},
		"ours go first": {map[string]string{"io.cloudhv.default_memory": "600MiB", kata + "default_memory": "700"}, hostVCPUs(), 600 * mib, 0},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPod(t, testnode.CloudHV, func(cfg *runtimeapi.PodSandboxConfig) { cfg.Annotations = tc.annotations })
			c := p.idle("c")
			c.requireSize(tc.vcpus, tc.memory)
			if tc.max > 0 {
				require.Equal(t, tc.max, p.info().MaxMemoryBytes)
				require.ErrorContains(t, p.resize(tc.max, 0), "must be at most")
				require.NoError(t, p.resize(tc.max-overhead, 0))
				c.requireSize(tc.vcpus, tc.max)
			}
		})
	}
}

// TestAnnotationsRefused checks that a wrong annotation is an error that names it,
// its value and what would be right, and that nothing was made for such a pod.
func TestAnnotationsRefused(t *testing.T) {
	requireCloudHV(t)
	n := node(t)
	before, err := settled(testContext(t), n)
	require.NoError(t, err)
	for _, tc := range [][3]string{
		{"io.cloudhv.default_vcpus", "many", "from 1 to"},
		{"io.cloudhv.default_vcpus", "0", "from 1 to"},
		{"io.cloudhv.default_max_vcpus", "4000", "from 1 to"},
		{"io.cloudhv.default_memory", "-1", `from "64MiB" to`},
		{"io.cloudhv.default_memory", "12Q", `from "64MiB" to`},
		{"io.cloudhv.default_memory", "10TiB", `from "64MiB" to`},
		{"io.cloudhv.default_maxmemory", "100MiB", `from "512MiB" to`},
		{"io.cloudhv.enable_virtio_mem", "maybe", "true or false"},
		{"io.cloudhv.no_such_annotation", "1", "io.cloudhv.default_memory"},
		{"io.katacontainers.config.hypervisor.default_vcpus", "0", "from 1 to"},
		{"io.katacontainers.config.hypervisor.default_memory", "1GiB", "MiB from 64 to"},
	} {
		_, err := n.RunPod(testContext(t), podConfig(t, func(cfg *runtimeapi.PodSandboxConfig) { cfg.Annotations = map[string]string{tc[0]: tc[1]} }), testnode.CloudHV)
		require.ErrorContains(t, err, fmt.Sprintf("annotation %s = %q: ", tc[0], tc[1]))
		require.ErrorContains(t, err, tc[2])
	}
	_, err = n.RunPod(testContext(t), podConfig(t, func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Annotations = map[string]string{"io.cloudhv.default_memory": "700MiB", "io.cloudhv.default_maxmemory": "600MiB"}
	}), testnode.CloudHV)
	require.ErrorContains(t, err, `annotation io.cloudhv.default_memory = "700MiB": must be at most "600MiB" (io.cloudhv.default_maxmemory)`)
	require.NoError(t, n.RemoveAllPods(testContext(t)))
	require.NoError(t, n.AwaitCensus(testContext(t), before))
}

// machine asks for the memory, in bytes, and the processors of a container's machine.
func (c *container) machine() (memory int64, cpus int) {
	c.t.Helper()
	var available int64
	_, err := fmt.Sscan(c.exec(testimage.HelperPath, "mem"), &memory, &available, &cpus)
	require.NoError(c.t, err)
	return memory, cpus
}
