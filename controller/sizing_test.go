// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"math"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/controller/annotation"
	"github.com/cloudhv/containerd-cloudhv/controller/config"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

const mib = 1 << 20

// sizingConfig is that of a node of 4 processors and 2 GiB.
func sizingConfig() *config.Settings {
	return &config.Settings{
		DefaultVCPUs: 1, MaxVCPUs: 4, DefaultMemory: 256 << 20, MaxMemory: 2 << 30, BaseMemory: 128 << 20, MemoryOverhead: 64 << 20,
		Annotations: []string{"io.cloudhv.*", "io.katacontainers.config.hypervisor.*"},
	}
}

// cri are limits as CRI tells them.
func cri(memory, quota, period int64) *runtime.LinuxContainerResources {
	return &runtime.LinuxContainerResources{MemoryLimitInBytes: memory, CpuQuota: quota, CpuPeriod: period}
}

// TestSizing is about a pod when it starts.
func TestSizing(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		annotations map[string]string
		res         *runtime.LinuxContainerResources
		vcpus       int
		memory      int64
		bad         string
	}{
		"nothing said":                {vcpus: 1, memory: 256 * mib},
		"no limits":                   {res: cri(0, -1, 100000), vcpus: 1, memory: 256 * mib},
		"limits":                      {res: cri(512*mib, 200000, 100000), vcpus: 2, memory: 576 * mib},
		"rounded up":                  {res: cri(512*mib+1, 100001, 100000), vcpus: 2, memory: 580 * mib},
		"a fraction of a processor":   {res: cri(0, 1000, 100000), vcpus: 1, memory: 256 * mib},
		"default period":              {res: cri(0, 300000, 0), vcpus: 3, memory: 256 * mib},
		"another period":              {res: cri(0, 30000, 10000), vcpus: 3, memory: 256 * mib},
		"less than a guest needs":     {res: cri(4*mib, 0, 0), vcpus: 1, memory: 128 * mib},
		"annotations":                 {annotations: map[string]string{"io.cloudhv.default_vcpus": "3", "io.cloudhv.default_memory": "300MiB"}, vcpus: 3, memory: 300 * mib},
		"limits win over annotations": {annotations: map[string]string{"io.cloudhv.default_vcpus": "3", "io.cloudhv.default_memory": "300MiB"}, res: cri(512*mib, 200000, 0), vcpus: 2, memory: 576 * mib},
		"all there is":                {res: cri(2<<30-64*mib, 400000, 0), vcpus: 4, memory: 2 << 30},
		"too much memory":             {res: cri(2<<30, 0, 0), bad: "at most 2147483648 (max_memory"},
		"memory overflows":            {res: cri(math.MaxInt64, 0, 0), bad: "max_memory"},
		"more time than there is":     {res: cri(0, 400001, 0), vcpus: 4, memory: 256 * mib},
		"a huge quota":                {res: cri(0, math.MaxInt64, 1), vcpus: 4, memory: 256 * mib},
		"negative period":             {res: cri(0, 1, -1), bad: "cpu_period = -1"},
		"both wrong":                  {res: cri(4<<30, 900000, 0), bad: "max_memory"},
		"a lower bound":               {annotations: map[string]string{"io.cloudhv.default_maxmemory": "1GiB", "io.cloudhv.default_max_vcpus": "2"}, res: cri(960*mib, 200000, 0), vcpus: 2, memory: 1 << 30},
		"memory over the bound":       {annotations: map[string]string{"io.cloudhv.default_maxmemory": "1GiB"}, res: cri(961*mib, 0, 0), bad: "io.cloudhv.default_maxmemory"},
		"vcpus over the bound":        {annotations: map[string]string{annotation.Kata + "default_max_vcpus": "2"}, res: cri(0, 200001, 0), vcpus: 2, memory: 256 * mib},
		"the node's default bounded":  {annotations: map[string]string{"io.cloudhv.default_maxmemory": "200MiB"}, vcpus: 1, memory: 200 * mib},
		"default over max":            {annotations: map[string]string{"io.cloudhv.default_maxmemory": "512MiB", "io.cloudhv.default_memory": "516MiB"}, bad: `annotation io.cloudhv.default_memory = "516MiB": must be at most "512MiB" (io.cloudhv.default_maxmemory)`},
		"default vcpus over max":      {annotations: map[string]string{"io.cloudhv.default_max_vcpus": "1", "io.cloudhv.default_vcpus": "2"}, bad: `annotation io.cloudhv.default_vcpus = "2": must be from 1 to 1 (io.cloudhv.default_max_vcpus)`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o, err := parseAnnotations(tc.annotations, sizingConfig())
			require.NoError(t, err)
			s, err := newSizing(sizingConfig(), o, tc.res)
			var size vmm.Size
			if err == nil {
				size, err = s.size(nil)
			}
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

// TestSizingWithContainers is about what a pod's containers add.
func TestSizingWithContainers(t *testing.T) {
	t.Parallel()
	memory := func(sizes ...int64) []limits {
		var all []limits
		for _, n := range sizes {
			all = append(all, limits{memory: n})
		}
		return all
	}
	for name, tc := range map[string]struct {
		pod        *runtime.LinuxContainerResources
		containers []limits
		vcpus      int
		memory     int64
		bad        string
	}{
		"none":                         {vcpus: 1, memory: 256 * mib},
		"one without limits":           {containers: memory(0), vcpus: 1, memory: 256 * mib},
		"one below the default":        {containers: memory(100 * mib), vcpus: 1, memory: 256 * mib},
		"one":                          {containers: memory(300 * mib), vcpus: 1, memory: 364 * mib},
		"two":                          {containers: memory(300*mib, 200*mib), vcpus: 1, memory: 564 * mib},
		"one beside one without":       {containers: memory(300*mib, 0), vcpus: 1, memory: 556 * mib},
		"those without share":          {containers: memory(300*mib, 0, -1), vcpus: 1, memory: 556 * mib},
		"a small one beside one":       {containers: memory(10*mib, 0), vcpus: 1, memory: 268 * mib},
		"the pod's limit goes first":   {pod: cri(300*mib, 100000, 0), containers: []limits{{memory: 1 << 30, quota: 300000}, {}}, vcpus: 1, memory: 364 * mib},
		"only a CPU limit of the pod":  {pod: cri(0, 200000, 0), containers: memory(300 * mib), vcpus: 2, memory: 364 * mib},
		"too much together":            {containers: memory(1<<30, 1<<30), bad: "the memory limits of its containers, 2147483648 bytes together"},
		"too much for memory to count": {containers: memory(math.MaxInt64, math.MaxInt64), bad: "max_memory"},
		"a CPU limit":                  {containers: []limits{{quota: 150000}}, vcpus: 2, memory: 256 * mib},
		"parts of a processor add up":  {containers: []limits{{quota: 50000}, {quota: 5000, period: 10000}, {quota: 1}}, vcpus: 2, memory: 256 * mib},
		"no more than there are":       {containers: []limits{{quota: 300000}, {quota: 300000}}, vcpus: 4, memory: 256 * mib},
		"a quota beyond all":           {containers: []limits{{quota: math.MaxInt64, period: 1}, {quota: math.MaxInt64}}, vcpus: 4, memory: 256 * mib},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, err := newSizing(sizingConfig(), overrides{}, tc.pod)
			require.NoError(t, err)
			size, err := s.size(tc.containers)
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

// What an update does not mention stays.
func TestSizingUpdated(t *testing.T) {
	t.Parallel()
	s, err := newSizing(sizingConfig(), overrides{}, cri(512*mib, 200000, 0))
	require.NoError(t, err)
	same, err := s.with(nil)
	require.NoError(t, err)
	require.Equal(t, s, same)
	more, err := s.with(cri(1<<30, 0, 0))
	require.NoError(t, err)
	size, err := more.size(nil)
	require.NoError(t, err)
	require.Equal(t, vmm.Size{VCPUs: 2, MemoryBytes: 1<<30 + 64*mib}, size)
	_, err = s.with(cri(0, 5, -5))
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}

// A RuntimeClass whose overhead cannot hold a VMM is told of, once.
func TestOverheadThatIsTooSmall(t *testing.T) {
	n := newNode(t)
	hooks := log.L.Logger.ReplaceHooks(logrus.LevelHooks{})
	defer log.L.Logger.ReplaceHooks(hooks)
	lines := &countLogs{}
	log.L.Logger.AddHook(lines)
	told := func(overhead int64) int64 {
		before := lines.n.Load()
		n.checkOverhead(t.Context(), overhead)
		return lines.n.Load() - before
	}
	require.Zero(t, told(0), "none is stated")
	require.Zero(t, told(n.overhead()))
	require.EqualValues(t, 1, told(64*mib))
	require.Zero(t, told(64*mib))
	require.EqualValues(t, 1, told(n.overhead()-1))
}

// TestDocumentedSizes are the examples of docs/sizing.md, in its order.
func TestDocumentedSizes(t *testing.T) {
	t.Parallel()
	cfg := sizingConfig()
	cfg.DefaultVCPUs, cfg.MaxVCPUs = 8, 8
	cfg.DefaultMemory, cfg.BaseMemory, cfg.MaxMemory = 512*mib, 512*mib, 32<<30
	for i, tc := range []struct {
		pod         *runtime.LinuxContainerResources
		annotations map[string]string
		containers  []limits
		memory      int64 // in MiB, 0 where the pod or the last container is refused
		vcpus       int
	}{
		{memory: 512, vcpus: 8},
		{pod: cri(256*mib, 50000, 0), containers: []limits{{memory: 1 << 40}}, memory: 512, vcpus: 1},
		{pod: cri(1024*mib, 250000, 0), containers: []limits{{}}, memory: 1088, vcpus: 3},
		{annotations: map[string]string{"io.cloudhv.default_memory": "1GiB", "io.cloudhv.default_vcpus": "2"}, memory: 1024, vcpus: 2},
		{pod: cri(2048*mib, 0, 0), annotations: map[string]string{"io.cloudhv.default_memory": "1GiB"}, memory: 2112, vcpus: 8},
		{containers: []limits{{memory: 300 * mib}}, memory: 512, vcpus: 8},
		{containers: []limits{{memory: 700 * mib}}, memory: 764, vcpus: 8},
		{containers: []limits{{memory: 700 * mib}, {memory: 500 * mib}}, memory: 1264, vcpus: 8},
		{containers: []limits{{memory: 700 * mib}, {}}, memory: 1212, vcpus: 8},
		{annotations: map[string]string{"io.cloudhv.default_vcpus": "1"}, containers: []limits{{quota: 150000}}, memory: 512, vcpus: 2},
		{annotations: map[string]string{"io.cloudhv.default_vcpus": "1"}, containers: []limits{{quota: 150000}, {quota: 200000}}, memory: 512, vcpus: 4},
		{annotations: map[string]string{"io.cloudhv.default_maxmemory": "1GiB"}, containers: []limits{{memory: 1536 * mib}}},
		{pod: cri(2048*mib, 0, 0), annotations: map[string]string{"io.cloudhv.default_maxmemory": "1GiB"}},
	} {
		o, err := parseAnnotations(tc.annotations, cfg)
		require.NoError(t, err)
		s, err := newSizing(cfg, o, tc.pod)
		require.NoError(t, err)
		size, err := s.size(tc.containers)
		if tc.memory == 0 {
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument, "%d", i)
			continue
		}
		require.NoError(t, err, "%d", i)
		require.Equal(t, vmm.Size{VCPUs: tc.vcpus, MemoryBytes: tc.memory * mib}, size, "%d", i)
	}
}
