// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/sandbox"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/controller/config"
	hostv1 "github.com/cloudhv/containerd-cloudhv/controller/hostapi/v1"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

func TestPodSize(t *testing.T) {
	t.Parallel()
	cfg := &config.Settings{
		DefaultVCPUs: 1, MaxVCPUs: 4, DefaultMemory: 256 << 20, MaxMemory: 2 << 30, BaseMemory: 128 << 20, MemoryOverhead: 64 << 20,
	}
	const mib = 1 << 20
	res := func(memory, quota, period int64) *runtime.LinuxContainerResources {
		return &runtime.LinuxContainerResources{MemoryLimitInBytes: memory, CpuQuota: quota, CpuPeriod: period}
	}
	for name, tc := range map[string]struct {
		o             overrides
		res, overhead *runtime.LinuxContainerResources
		vcpus         int
		memory        int64
		bad           string
	}{
		"nothing said":                {vcpus: 1, memory: 256 * mib},
		"no limits":                   {res: res(0, -1, 100000), vcpus: 1, memory: 256 * mib},
		"limits":                      {res: res(512*mib, 200000, 100000), vcpus: 2, memory: 576 * mib},
		"rounded up":                  {res: res(512*mib+1, 100001, 100000), vcpus: 2, memory: 580 * mib},
		"a fraction of a processor":   {res: res(0, 1000, 100000), vcpus: 1, memory: 256 * mib},
		"default period":              {res: res(0, 300000, 0), vcpus: 3, memory: 256 * mib},
		"another period":              {res: res(0, 30000, 10000), vcpus: 3, memory: 256 * mib},
		"overhead of the class":       {res: res(512*mib, 0, 0), overhead: res(100*mib, 0, 0), vcpus: 1, memory: 612 * mib},
		"overhead without a limit":    {overhead: res(100*mib, 0, 0), vcpus: 1, memory: 256 * mib},
		"less than a guest needs":     {res: res(4*mib, 0, 0), vcpus: 1, memory: 128 * mib},
		"annotations":                 {o: overrides{vcpus: 3, memory: 300 * mib}, vcpus: 3, memory: 300 * mib},
		"limits win over annotations": {o: overrides{vcpus: 3, memory: 300 * mib}, res: res(512*mib, 200000, 0), vcpus: 2, memory: 576 * mib},
		"all there is":                {res: res(2<<30-64*mib, 400000, 0), vcpus: 4, memory: 2 << 30},
		"too much memory":             {res: res(2<<30, 0, 0), bad: "max_memory"},
		"memory overflows":            {res: res(math.MaxInt64, 0, 0), bad: "max_memory"},
		"too many vcpus":              {res: res(0, 400001, 0), bad: "5 vCPUs"},
		"quota overflows":             {res: res(0, math.MaxInt64, 1), bad: "max_vcpus"},
		"annotation asks too much":    {o: overrides{vcpus: 200}, bad: "max_vcpus"},
		"negative period":             {res: res(0, 1, -1), bad: "cpu_period"},
		"both wrong":                  {res: res(4<<30, 900000, 0), bad: "max_memory"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			size, err := podSize(cfg, tc.o, tc.res, tc.overhead)
			if tc.bad != "" {
				require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
				require.ErrorContains(t, err, tc.bad)
				return
			}
			require.NoError(t, err)
			require.Equal(t, vmm.Size{VCPUs: tc.vcpus, MemoryBytes: tc.memory}, size)
		})
	}
}

func TestAnnotations(t *testing.T) {
	t.Parallel()
	all := []string{"io.cloudhv.*", "io.katacontainers.config.hypervisor.*"}
	for name, tc := range map[string]struct {
		annotations map[string]string
		allowed     []string
		want        overrides
		bad         []string
	}{
		"none":   {nil, all, overrides{}, nil},
		"others": {map[string]string{"kubernetes.io/x": "y", "io.cloudhvx": "z"}, all, overrides{}, nil},
		"ours": {map[string]string{
			"io.cloudhv.default_vcpus": "2", "io.cloudhv.default_memory": "1GiB", "io.cloudhv.kernel_params": "a=b  c",
		}, all, overrides{vcpus: 2, memory: 1 << 30, kernelParams: []string{"a=b", "c"}}, nil},
		"kata's": {map[string]string{
			kataPrefix + "default_vcpus": "2", kataPrefix + "default_memory": "1024",
		}, all, overrides{vcpus: 2, memory: 1 << 30}, nil},
		"ours win":             {map[string]string{kataPrefix + "default_vcpus": "2", "io.cloudhv.default_vcpus": "3"}, all, overrides{vcpus: 3}, nil},
		"kata's that we lack":  {map[string]string{kataPrefix + "enable_iommu": "true"}, all, overrides{}, nil},
		"ours that is unknown": {map[string]string{"io.cloudhv.vcpu": "2"}, all, overrides{}, []string{"io.cloudhv.vcpu", "io.cloudhv.default_vcpus"}},
		"a wrong number":       {map[string]string{"io.cloudhv.default_vcpus": "0"}, all, overrides{}, []string{`= "0"`, "at least 1"}},
		"a wrong size":         {map[string]string{"io.cloudhv.default_memory": "1G"}, all, overrides{}, []string{`= "1G"`, "512MiB"}},
		"kata's unit":          {map[string]string{kataPrefix + "default_memory": "1GiB"}, all, overrides{}, []string{"MiB"}},
		"a control character":  {map[string]string{"io.cloudhv.kernel_params": "a\nb"}, all, overrides{}, []string{"printable"}},
		"not allowed":          {map[string]string{"io.cloudhv.default_vcpus": "2"}, nil, overrides{}, []string{"does not allow"}},
		"one is allowed":       {map[string]string{"io.cloudhv.default_vcpus": "2"}, []string{"io.cloudhv.default_vcpus"}, overrides{vcpus: 2}, nil},
		"another is allowed":   {map[string]string{"io.cloudhv.default_vcpus": "2"}, []string{"io.cloudhv.default_memory"}, overrides{}, []string{"does not allow"}},
		"all errors together": {map[string]string{
			"io.cloudhv.default_vcpus": "x", "io.cloudhv.default_memory": "y",
		}, all, overrides{}, []string{"default_vcpus", "default_memory"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := parseAnnotations(tc.annotations, tc.allowed)
			if tc.bad == nil {
				require.NoError(t, err)
				require.Equal(t, tc.want, got)
				return
			}
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			for _, w := range tc.bad {
				require.ErrorContains(t, err, w)
			}
		})
	}
}

func TestCgroupPath(t *testing.T) {
	t.Parallel()
	for parent, want := range map[string]string{
		"":                                  "/cloudhv/cloudhv-x",
		"/kubepods/burstable/pod1":          "/kubepods/burstable/pod1/cloudhv-x",
		"kubepods/pod1":                     "/kubepods/pod1/cloudhv-x",
		"system.slice":                      "/system.slice/cloudhv-x",
		"kubepods-burstable-p1.slice":       "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-p1.slice/cloudhv-x",
		"/kubepods.slice/kubepods-p1.slice": "/kubepods.slice/kubepods-p1.slice/cloudhv-x",
		"../../etc":                         "/etc/cloudhv-x",
	} {
		require.Equal(t, want, cgroupPath("/cloudhv", parent, "x"), parent)
	}
}

// The files are those that CRI makes for its own pods.
func TestPodFiles(t *testing.T) {
	t.Parallel()
	c := New(Options{Settings: &config.Settings{UnprivilegedPorts: true}})
	s, err := c.podFiles(&runtime.PodSandboxConfig{
		DnsConfig: &runtime.DNSConfig{Servers: []string{"1.1.1.1", "::1"}, Searches: []string{"a.b", "c"}, Options: []string{"ndots:5"}},
		Linux:     &runtime.LinuxPodSandboxConfig{Sysctls: map[string]string{"kernel.x": "1"}},
	})
	require.NoError(t, err)
	hostname, err := os.Hostname()
	require.NoError(t, err)
	require.Equal(t, hostname, s.hostname)
	require.Equal(t, "search a.b c\nnameserver 1.1.1.1\nnameserver ::1\noptions ndots:5\n", string(s.resolvConf))
	require.Equal(t, map[string]string{"kernel.x": "1", "net.ipv4.ip_unprivileged_port_start": "0"}, s.sysctls)
	hosts, err := os.ReadFile(etcHosts)
	require.NoError(t, err)
	require.Equal(t, string(hosts), string(s.hosts))

	s, err = c.podFiles(&runtime.PodSandboxConfig{
		Hostname: "h", Linux: &runtime.LinuxPodSandboxConfig{Sysctls: map[string]string{"net.ipv4.ip_unprivileged_port_start": "80"}},
	})
	require.NoError(t, err)
	require.Equal(t, "h", s.hostname)
	require.Equal(t, "80", s.sysctls["net.ipv4.ip_unprivileged_port_start"])
	resolv, err := os.ReadFile(etcResolvConf)
	require.NoError(t, err)
	require.Equal(t, string(resolv), string(s.resolvConf))

	missing, err := readHostFile(filepath.Join(t.TempDir(), "none"))
	require.NoError(t, err)
	require.Empty(t, missing)
	large := filepath.Join(t.TempDir(), "large")
	require.NoError(t, os.WriteFile(large, make([]byte, maxHostFile+1), 0o600))
	_, err = readHostFile(large)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
}

func TestPrintable(t *testing.T) {
	t.Parallel()
	require.Equal(t, "abc", printable("abc", 10))
	require.Equal(t, "ab", printable("abc", 2))
	require.Equal(t, "a?[2J?", printable("a\x1b[2J\n", 10))
	require.Equal(t, "?x", printable("\xffx", 10))
	require.Len(t, printable(strings.Repeat("x", 1000), 100), 100)
}

func FuzzPrintable(f *testing.F) {
	f.Add("a\x00\xff\u202e", 3)
	f.Fuzz(func(t *testing.T, s string, limit int) {
		limit = min(max(limit, 0), 4096)
		got := printable(s, limit)
		if strings.ContainsFunc(got, func(r rune) bool { return r < ' ' || r == 0x7f }) || len(got) > 3*limit {
			t.Fatalf("%q", got)
		}
	})
}

// extension is how CRI passes updated resources; the type's name is its own.
func extension(t *testing.T, res, overhead *runtime.LinuxContainerResources) sandbox.Sandbox {
	t.Helper()
	data, err := json.Marshal(updatedResources{Overhead: overhead, Resources: res})
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
	const mib = 1 << 20
	update := func(memory, quota int64) error {
		return n.Update(n.ctx(), "a", extension(t, &runtime.LinuxContainerResources{MemoryLimitInBytes: memory, CpuQuota: quota}, nil), "extensions")
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
	require.ErrorIs(t, update(0, 900000), errdefs.ErrInvalidArgument)
	require.Equal(t, vmm.Size{VCPUs: 1, MemoryBytes: 576 * mib}, m.size)

	n.driver.vm.resize = errInjected
	require.ErrorIs(t, update(1024*mib, 0), errInjected)
	n.driver.vm.resize = nil
	m.agent.resize = errdefs.ErrUnavailable
	require.ErrorIs(t, update(128*mib, 0), errdefs.ErrUnavailable)
	require.Equal(t, int64(576*mib), p.snapshot().Size.MemoryBytes)

	require.NoError(t, n.Update(n.ctx(), "a", sandbox.Sandbox{}, "labels"))
	require.NoError(t, n.Update(n.ctx(), "a", extension(t, nil, nil), "labels"))
	bad := sandbox.Sandbox{Extensions: map[string]typeurl.Any{resourcesKey: criAny([]byte("{"))}}
	require.ErrorIs(t, n.Update(n.ctx(), "a", bad), errdefs.ErrInvalidArgument)
	m.agent.resize = nil
	require.NoError(t, n.Stop(n.ctx(), "a"))
	require.ErrorIs(t, update(1024*mib, 0), errdefs.ErrUnavailable)
}

func TestAttachRootFSOnceAVM(t *testing.T) {
	n := newNode(t)
	for i := range 6 {
		n.containers.sandbox[fmt.Sprint("c", i)] = "a"
	}
	n.containers.sandbox["d"] = "a"
	n.run("a")
	var wg sync.WaitGroup
	serials := make([]string, 6)
	for i := range serials {
		wg.Go(func() {
			resp, err := n.HostService().AttachRootFS(n.ctx(), &hostv1.AttachRootFSRequest{SandboxId: "a", ContainerId: fmt.Sprint("c", i)})
			if err != nil {
				t.Error(err)
				return
			}
			serials[i] = resp.GetImageSerial()
		})
	}
	wg.Wait()
	for _, s := range serials {
		require.Equal(t, "image-of-c", s)
	}
	_, err := n.attachRootFS(n.ctx(), "a", "d")
	require.NoError(t, err)
	require.Equal(t, map[string]int{"image-of-c": 1, "image-of-d": 1}, n.driver.only(t).disks)
	require.Equal(t, map[string]int{"image-of-c": 1, "image-of-d": 1}, n.images.pins)
	require.NoError(t, n.Shutdown(n.ctx(), "a"))
	n.requireNothing()
}

func TestAttachRootFSThatFails(t *testing.T) {
	n := newNode(t)
	n.containers.sandbox["c1"] = "a"
	n.containers.sandbox["x1"] = "other"
	attach := func(sandbox, container string) error {
		_, err := n.HostService().AttachRootFS(n.ctx(), &hostv1.AttachRootFSRequest{SandboxId: sandbox, ContainerId: container})
		return errgrpc.ToNative(err)
	}
	require.ErrorIs(t, attach("a", "c1"), errdefs.ErrNotFound)
	require.NoError(t, n.create("a"))
	require.ErrorIs(t, attach("a", "c1"), errdefs.ErrUnavailable)
	_, err := n.Start(n.ctx(), "a")
	require.NoError(t, err)
	require.ErrorIs(t, attach("a", "nobody"), errdefs.ErrNotFound)
	require.ErrorIs(t, attach("a", "x1"), errdefs.ErrInvalidArgument)
	n.images.err = errdefs.ErrNotImplemented
	require.ErrorIs(t, attach("a", "c1"), errdefs.ErrNotImplemented)
	n.images.err = nil
	n.driver.vm.disk = errInjected
	require.ErrorIs(t, attach("a", "c1"), errdefs.ErrResourceExhausted)
	require.Empty(t, n.images.pins)
	n.driver.vm.disk = nil
	require.NoError(t, attach("a", "c1"))
	n.driver.only(t).die("x", false)
	_, err = n.Wait(n.ctx(), "a")
	require.NoError(t, err)
	require.ErrorIs(t, attach("a", "c1"), errdefs.ErrUnavailable)
}

// As long as the VM may have the disk its file has to stay.
func TestAttachRootFSThatMayHaveWorked(t *testing.T) {
	n := newNode(t)
	n.containers.sandbox["c1"] = "a"
	p := n.run("a")
	m := n.driver.only(t)
	pinned := map[string]int{"image-of-c": 1}
	n.driver.vm.disk, n.driver.vm.diskStays = fmt.Errorf("device_add: %w", context.DeadlineExceeded), true
	_, err := n.attachRootFS(n.ctx(), "a", "c1")
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.Equal(t, pinned, n.images.pins)
	require.Equal(t, map[string]bool{"image-of-c": false}, p.snapshot().Images)

	n.driver.vm.disk, n.driver.vm.unplug = nil, errInjected
	_, err = n.attachRootFS(n.ctx(), "a", "c1")
	require.ErrorIs(t, err, errInjected, "it cannot be unplugged, so it is not plugged in again")
	require.Equal(t, pinned, n.images.pins)
	n.restart()
	require.Equal(t, pinned, n.images.pins, "nor does another containerd forget it")

	n.driver.vm.unplug, n.driver.vm.disk, n.driver.vm.diskStays = nil, errInjected, false
	_, err = n.attachRootFS(n.ctx(), "a", "c1")
	require.ErrorIs(t, err, errInjected)
	require.Empty(t, m.disks)
	require.Empty(t, n.images.pins, "it is known now that the VM has no such disk")

	n.driver.vm.disk = nil
	_, err = n.attachRootFS(n.ctx(), "a", "c1")
	require.NoError(t, err)
	require.Equal(t, map[string]int{"image-of-c": 1}, m.disks)
	require.Equal(t, pinned, n.images.pins)
	require.NoError(t, n.Shutdown(n.ctx(), "a"))
	n.requireNothing()
}

// An earlier containerd may have ended between the plugging and its record.
func TestAttachRootFSAfterACrash(t *testing.T) {
	n := newNode(t)
	n.containers.sandbox["c1"] = "a"
	n.run("a")
	_, err := n.attachRootFS(n.ctx(), "a", "c1")
	require.NoError(t, err)
	rewrite(n, "a", func(r *record) { r.Images = map[string]bool{"image-of-c": false} })
	n.restart()
	serial, err := n.attachRootFS(n.ctx(), "a", "c1")
	require.NoError(t, err)
	require.Equal(t, "image-of-c", serial)
	require.Equal(t, map[string]int{"image-of-c": 1}, n.driver.only(t).disks)
	require.Equal(t, map[string]int{"image-of-c": 1}, n.images.pins)
}

func TestScratchDisks(t *testing.T) {
	t.Parallel()
	s := newScratchStore(t.TempDir(), 64<<20)
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			if err := s.make(t.Context(), s.path(fmt.Sprint(i))); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	template, err := os.ReadFile(s.templatePath())
	require.NoError(t, err)
	require.Len(t, template, 64<<20)
	for i := range 4 {
		disk, err := os.ReadFile(s.path(fmt.Sprint(i)))
		require.NoError(t, err)
		require.True(t, string(disk) == string(template), "a copy")
		var st unix.Stat_t
		require.NoError(t, unix.Stat(s.path(fmt.Sprint(i)), &st))
		require.Less(t, st.Blocks*512, int64(8<<20), "sparse")
	}
	require.Error(t, s.make(t.Context(), s.path("0")), "never onto another's disk")
	require.FileExists(t, s.path("0"))
	require.NoError(t, removeScratch(s.path("0")))
	require.NoError(t, removeScratch(s.path("0")))
	require.NoError(t, removeScratch(""))
}
