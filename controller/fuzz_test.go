// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	hostv1 "github.com/cloudhv/containerd-cloudhv/controller/hostapi/v1"
)

// FuzzRecord reads any file as a sandbox's record: it is one, which can be told of and
// written again, or it is refused as damaged.
func FuzzRecord(f *testing.F) {
	good, err := json.Marshal(&record{
		Version: recordVersion, ID: "pod1", Namespace: "k8s.io", State: StateReady, Images: map[string]bool{"a": true},
		Sizing: &sizing{Base: 1}, Phases: []Phase{{Name: "boot"}},
	})
	require.NoError(f, err)
	f.Add(good)
	f.Add([]byte(strings.Replace(string(good), `"ready"`, `"strange"`, 1)))
	f.Add([]byte(`{"version":2,"id":"pod1"}`))
	f.Add([]byte("null"))
	dir := filepath.Join(f.TempDir(), "pod1")
	require.NoError(f, os.Mkdir(dir, 0o700))
	f.Fuzz(func(t *testing.T, data []byte) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, recordFile), data, 0o600))
		r, err := loadRecord(dir)
		if err != nil {
			require.ErrorIs(t, err, errdefs.ErrDataLoss)
			return
		}
		_, _ = r.sizing().size(nil)
		p := newPod(dir, *r)
		_, err = json.Marshal((&Controller{pods: map[string]*pod{r.ID: p}}).info(p, r))
		require.NoError(t, err)
		require.NoError(t, r.save(dir))
		again, err := loadRecord(dir)
		require.NoError(t, err)
		first, err := json.Marshal(r)
		require.NoError(t, err)
		second, err := json.Marshal(again)
		require.NoError(t, err)
		require.JSONEq(t, string(first), string(second))
	})
}

// FuzzAnnotations has any value for each annotation: it gives a VM within what is allowed,
// or an error that names it.
func FuzzAnnotations(f *testing.F) {
	f.Add("io.cloudhv.default_vcpus", "2")
	f.Add("io.cloudhv.default_memory", "1GiB")
	f.Add("io.katacontainers.config.hypervisor.default_vcpus", "1e308")
	f.Add("io.katacontainers.config.hypervisor.default_memory", "9223372036854775807")
	f.Add("io.cloudhv.kernel_params", "a=b\x00")
	f.Add("io.cloudhv.unknown", "")
	f.Fuzz(func(t *testing.T, key, value string) {
		cfg := sizingConfig()
		o, err := parseAnnotations(map[string]string{key: value}, cfg)
		if err != nil {
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			require.ErrorContains(t, err, key)
			return
		}
		s, err := newSizing(cfg, o, nil)
		if err != nil {
			return
		}
		size, err := s.size(nil)
		if err == nil {
			require.Positive(t, size.VCPUs)
			require.LessOrEqual(t, size.VCPUs, cfg.MaxVCPUs)
			require.Positive(t, size.MemoryBytes)
			require.LessOrEqual(t, size.MemoryBytes, cfg.MaxMemory+cfg.MemoryOverhead)
		}
	})
}

// FuzzPod has CRI configure a pod by any message, and give it other resources by any JSON.
func FuzzPod(f *testing.F) {
	good, err := proto.Marshal(&runtime.PodSandboxConfig{
		Hostname: "h", DnsConfig: &runtime.DNSConfig{Servers: []string{"1.2.3.4"}},
		Linux: &runtime.LinuxPodSandboxConfig{
			Resources: &runtime.LinuxContainerResources{CpuQuota: 100000, CpuPeriod: 100000, MemoryLimitInBytes: 1 << 30},
			Sysctls:   map[string]string{"net.core.somaxconn": "1"},
			SecurityContext: &runtime.LinuxSandboxSecurityContext{NamespaceOptions: &runtime.NamespaceOption{UsernsOptions: &runtime.UserNamespace{
				Mode: runtime.NamespaceMode_POD, Uids: []*runtime.IDMapping{{HostId: 1000, Length: 65536}}, Gids: []*runtime.IDMapping{{HostId: 1000, Length: 65536}},
			}}},
		},
	})
	require.NoError(f, err)
	f.Add(good, []byte(`{"Resources":{"cpu_quota":200000,"cpu_period":100000}}`))
	f.Add([]byte{}, []byte(`{"Resources":{"cpu_quota":-1,"cpu_period":-9223372036854775808,"memory_limit_in_bytes":9223372036854775807}}`))
	f.Fuzz(func(t *testing.T, config, update []byte) {
		pc := &runtime.PodSandboxConfig{}
		if proto.Unmarshal(config, pc) != nil {
			return
		}
		cfg := sizingConfig()
		c := &Controller{cfg: cfg}
		_ = checkPod(pc)
		_, _ = c.podFiles(pc)
		s, err := newSizing(cfg, overrides{}, pc.GetLinux().GetResources())
		if err != nil {
			return
		}
		within := func(s sizing, extra ...limits) {
			size, err := s.size(extra)
			if err == nil {
				require.Positive(t, size.VCPUs)
				require.LessOrEqual(t, size.VCPUs, cfg.MaxVCPUs)
				require.Positive(t, size.MemoryBytes)
				require.LessOrEqual(t, size.MemoryBytes, cfg.MaxMemory+cfg.MemoryOverhead)
			}
		}
		within(s)
		var res updatedResources
		if json.Unmarshal(update, &res) != nil {
			return
		}
		if next, err := s.with(res.Resources); err == nil {
			within(next)
		}
		r := res.Resources
		within(s, limits{memory: r.GetMemoryLimitInBytes(), quota: r.GetCpuQuota(), period: uint64(r.GetCpuPeriod())})
	})
}

// FuzzReport reads what a shim tells, some of which is a guest's.
func FuzzReport(f *testing.F) {
	good, err := proto.Marshal(&hostv1.ReportRequest{
		SandboxId: "pod1", ContainerId: "c", Call: "create", TookUsec: 100,
		Parts: []*hostv1.Part{{Name: "guest", AtUsec: 10, TookUsec: 50}, {Name: "crun\x1b", AtUsec: 1 << 63, TookUsec: 1 << 63, Guest: true}},
	})
	require.NoError(f, err)
	f.Add(good)
	f.Fuzz(func(t *testing.T, data []byte) {
		req := &hostv1.ReportRequest{}
		if proto.Unmarshal(data, req) != nil {
			return
		}
		r := readReport(req)
		require.LessOrEqual(t, len(r.parts), maxGuestSteps)
		require.True(t, r.took >= 0 && r.took <= time.Hour)
		for _, p := range r.parts {
			require.True(t, p.at >= 0 && p.took >= 0 && p.at+p.took <= r.took, "%+v of %v", p, r.took)
			require.LessOrEqual(t, len(p.name), maxGuestText*utf8.UTFMax)
		}
		r.trace(t.Context())
	})
}
