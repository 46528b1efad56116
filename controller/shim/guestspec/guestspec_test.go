// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package guestspec

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

var update = flag.Bool("update", false, "write the golden files anew")

// generate makes a spec with containerd's own package, and the namespaces that
// CRI gives it.
func generate(t testing.TB, opts ...oci.SpecOpts) *specs.Spec {
	t.Helper()
	ctx := namespaces.WithNamespace(context.Background(), "k8s.io")
	opts = append([]oci.SpecOpts{
		oci.WithoutRunMount,
		oci.WithProcessArgs("sh", "-c", "true"),
		oci.WithDefaultPathEnv,
		// The default has a path for each of the host's processors.
		oci.WithMaskedPaths([]string{"/proc/kcore", "/proc/keys"}),
		oci.WithMounts([]specs.Mount{{
			Source: "cgroup", Destination: "/sys/fs/cgroup", Type: "cgroup",
			Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro", "nsdelegate", "memory_recursiveprot"},
		}}),
		oci.WithCgroup("/kubepods/burstable/pod1/c"),
		oci.WithAnnotations(map[string]string{"io.kubernetes.cri.container-type": "container", "run.oci.handler": "krun"}),
	}, opts...)
	spec, err := oci.GenerateSpec(ctx, nil, &containers.Container{ID: "c"}, opts...)
	require.NoError(t, err)
	for i, ns := range spec.Linux.Namespaces {
		if name := podNamespaces[ns.Type]; name != "" {
			spec.Linux.Namespaces[i].Path = fmt.Sprintf("/proc/%d/ns/%s", testPid, name)
		}
	}
	return spec
}

// TestGolden compares what becomes of specs as CRI writes them.
func TestGolden(t *testing.T) {
	t.Parallel()
	adj := -997
	for name, opts := range map[string][]oci.SpecOpts{
		"default": nil,
		"limits": {
			oci.WithMemoryLimit(64 << 20), oci.WithMemorySwap(64 << 20), oci.WithCPUCFS(50000, 100000), oci.WithCPUShares(512),
			oci.WithCPUs("0-3"), oci.WithPidsLimit(100),
			func(_ context.Context, _ oci.Client, _ *containers.Container, s *specs.Spec) error {
				s.Process.OOMScoreAdj = &adj
				s.Process.SelinuxLabel = "system_u:system_r:container_t:s0"
				s.Linux.MountLabel = "system_u:object_r:container_file_t:s0"
				s.Process.ApparmorProfile = defaultAppArmor
				return nil
			},
		},
		"privileged": {
			oci.WithPrivileged, oci.WithCapabilities([]string{"CAP_SYS_ADMIN"}), oci.WithAllDevicesAllowed, oci.WithTTY,
			oci.WithUIDGID(1000, 1001), oci.WithRootFSReadonly(), oci.WithNoNewPrivileges,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := Translate(generate(t, opts...), "c", Pod{SandboxPid: testPid})
			require.NoError(t, err)
			assert.False(t, got.PrivateShm)
			data, err := json.MarshalIndent(got.Spec, "", "\t")
			require.NoError(t, err)
			file := filepath.Join("testdata", name+".json")
			if *update {
				require.NoError(t, os.MkdirAll("testdata", 0o755))
				require.NoError(t, os.WriteFile(file, append(data, '\n'), 0o644))
			}
			want, err := os.ReadFile(file)
			require.NoError(t, err)
			assert.Equal(t, string(want), string(data)+"\n")
		})
	}
}

func TestHostSpecStaysAsItIs(t *testing.T) {
	t.Parallel()
	host := generate(t)
	before, err := json.Marshal(host)
	require.NoError(t, err)
	_, err = Translate(host, "c", Pod{SandboxPid: testPid})
	require.NoError(t, err)
	after, err := json.Marshal(host)
	require.NoError(t, err)
	assert.JSONEq(t, string(before), string(after))
}

func TestNamespaces(t *testing.T) {
	t.Parallel()
	with := func(typ specs.LinuxNamespaceType, path string) func([]specs.LinuxNamespace) []specs.LinuxNamespace {
		return func(in []specs.LinuxNamespace) []specs.LinuxNamespace {
			var out []specs.LinuxNamespace
			for _, ns := range in {
				if ns.Type != typ {
					out = append(out, ns)
				}
			}
			return append(out, specs.LinuxNamespace{Type: typ, Path: path})
		}
	}
	without := func(typ specs.LinuxNamespaceType) func([]specs.LinuxNamespace) []specs.LinuxNamespace {
		return func(in []specs.LinuxNamespace) []specs.LinuxNamespace {
			out := with(typ, "")(in)
			return out[:len(out)-1]
		}
	}
	pod := fmt.Sprintf("/proc/%d/ns/pid", testPid)
	for _, tc := range []struct {
		name   string
		change func([]specs.LinuxNamespace) []specs.LinuxNamespace
		want   string // in the error
		pid    guestv1.PidNamespace
		target uint32
	}{
		{name: "own pid"},
		{name: "pod's pid", change: with(specs.PIDNamespace, pod), pid: guestv1.PidNamespace_PID_POD},
		{name: "task's pid", change: with(specs.PIDNamespace, "/proc/77/ns/pid"), pid: guestv1.PidNamespace_PID_TARGET, target: 77},
		{name: "stranger's pid", change: with(specs.PIDNamespace, "/proc/78/ns/pid"), want: "linux.namespaces.pid"},
		{name: "odd path", change: with(specs.PIDNamespace, "/proc/077x/ns/pid"), want: "linux.namespaces.pid"},
		{name: "host's pid", change: without(specs.PIDNamespace), want: "linux.namespaces.pid"},
		{name: "host's net", change: without(specs.NetworkNamespace), want: "linux.namespaces.network"},
		{name: "new net", change: with(specs.NetworkNamespace, ""), want: "linux.namespaces.network"},
		{name: "other net", change: with(specs.NetworkNamespace, "/run/netns/x"), want: "linux.namespaces.network"},
		{name: "other ipc", change: with(specs.IPCNamespace, "/proc/1/ns/ipc"), want: "linux.namespaces.ipc"},
		{name: "new uts", change: with(specs.UTSNamespace, ""), want: "linux.namespaces.uts"},
		{name: "host's mounts", change: without(specs.MountNamespace), want: "linux.namespaces.mount"},
		{name: "other mounts", change: with(specs.MountNamespace, "/x"), want: "linux.namespaces.mount"},
		{name: "cgroup", change: with(specs.CgroupNamespace, "")},
		{name: "other cgroup", change: with(specs.CgroupNamespace, "/x"), want: "linux.namespaces.cgroup"},
		{name: "user", change: with(specs.UserNamespace, ""), want: "linux.namespaces.user"},
		{name: "time", change: with(specs.TimeNamespace, ""), want: "linux.namespaces.time"},
		{name: "unknown", change: with("net2", ""), want: "linux.namespaces.net2"},
		{name: "twice", change: func(in []specs.LinuxNamespace) []specs.LinuxNamespace { return append(in, in[0]) }, want: "each namespace once"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			host := fullSpec()
			if tc.change != nil {
				host.Linux.Namespaces = tc.change(host.Linux.Namespaces)
			}
			got, err := Translate(host, "c", Pod{SandboxPid: testPid, IsTask: func(pid uint32) bool { return pid == 77 }})
			if tc.want != "" {
				assert.ErrorContains(t, err, tc.want)
				assert.ErrorIs(t, err, errdefs.ErrInvalidArgument)
				return
			}
			require.NoError(t, err)
			assert.Equal(t, tc.pid, got.PidNamespace)
			assert.Equal(t, tc.target, got.TargetPid)
			want := []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.CgroupNamespace}}
			if tc.pid == guestv1.PidNamespace_PID_CONTAINER {
				want = append(want, specs.LinuxNamespace{Type: specs.PIDNamespace})
			}
			assert.Equal(t, want, got.Spec.Linux.Namespaces)
		})
	}
	host := fullSpec()
	host.Linux.Namespaces = namespacesOf(pod)
	_, err := Translate(host, "c", Pod{SandboxPid: testPid, IsTask: func(uint32) bool { return true }})
	assert.ErrorContains(t, err, "by chance")
}

func TestMounts(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name  string
		mount specs.Mount
		want  string // in the error
		bind  bool
		shm   bool
	}{
		{name: "file", mount: specs.Mount{Type: "bind", Source: "/a", Destination: "/b", Options: []string{"rbind", "rprivate", "ro"}}, bind: true},
		{name: "bind by option", mount: specs.Mount{Source: "/a", Destination: "/b", Options: []string{"bind", "rw"}}, bind: true},
		{name: "relative source", mount: specs.Mount{Type: "bind", Source: "a", Destination: "/b"}, want: `mount "/b" source`},
		{name: "relative destination", mount: specs.Mount{Type: "tmpfs", Destination: "b"}, want: "absolute"},
		{name: "bidirectional", mount: specs.Mount{Type: "bind", Source: "/a", Destination: "/b", Options: []string{"rshared"}}, want: "rshared"},
		{name: "host's shared memory", mount: specs.Mount{Type: "bind", Source: "/dev/shm", Destination: "/dev/shm"}, want: "hostIPC"},
		{name: "unknown option", mount: specs.Mount{Type: "bind", Source: "/a", Destination: "/b", Options: []string{"rbind", "tmpcopyup"}}, want: "tmpcopyup"},
		{name: "no source", mount: specs.Mount{Type: "bind", Source: "/a\x00", Destination: "/b"}, want: `mount "/b" source`},
		{name: "idmap", mount: specs.Mount{Type: "bind", Source: "/a", Destination: "/b", Options: []string{"ridmap"}}, want: "ridmap"},
		{name: "block device", mount: specs.Mount{Type: "ext4", Source: "/dev/sda1", Destination: "/b"}, want: "ext4"},
		{name: "own shm", mount: specs.Mount{Type: "tmpfs", Source: "shm", Destination: "/dev/shm", Options: []string{"size=1g"}}, shm: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			host := fullSpec()
			host.Mounts = []specs.Mount{tc.mount}
			got, err := Translate(host, "c", Pod{SandboxPid: testPid})
			if tc.want != "" {
				assert.ErrorContains(t, err, tc.want)
				return
			}
			require.NoError(t, err)
			assert.Equal(t, tc.shm, got.PrivateShm)
			if tc.bind {
				want := tc.mount
				want.Type = "bind"
				assert.Equal(t, []specs.Mount{want}, got.Spec.Mounts)
			}
		})
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	host := fullSpec()
	host.Linux.Devices = append(host.Linux.Devices, specs.LinuxDevice{Path: "/dev/sg0", Type: "c", Major: 21})
	major := int64(8)
	host.Linux.Resources.Devices = append(host.Linux.Resources.Devices,
		specs.LinuxDeviceCgroup{Allow: true, Type: "b", Major: &major, Access: "rwm"},
		specs.LinuxDeviceCgroup{Allow: true, Access: "rwm"})
	host.Linux.Resources.Unified = map[string]string{"cpuset.cpus": "1", "io.max": "8:0 rbps=1"}
	host.Linux.Seccomp.Syscalls[0].Action = specs.ActNotify
	host.Process.Cwd, host.Process.Args = "", nil
	host.Annotations = map[string]string{"x": strings.Repeat("y", maxAnnotationBytes), "io.cloudhv.no_such": "1", "io.cloudhv.default_vcpus": "1"}
	_, err := Translate(host, "c", Pod{SandboxPid: testPid})
	require.Error(t, err)
	for _, want := range []string{"/dev/sg0", "b 8:*", "io.max", "SCMP_ACT_NOTIFY", "process.cwd", "process.args", "annotations", "annotations.io.cloudhv.no_such"} {
		assert.ErrorContains(t, err, want)
	}
	assert.NotContains(t, err.Error(), "cpuset")
	assert.NotContains(t, err.Error(), "annotations.io.cloudhv.default_vcpus is")
	_, err = Translate(&specs.Spec{}, "c", Pod{})
	for _, want := range []string{"process", "root", "linux"} {
		assert.ErrorContains(t, err, want+" is \"missing\"")
	}
	_, err = TranslateResources(nil)
	assert.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}

// FuzzTranslate looks for specs that bring a host path of a namespace, or odd ID mappings,
// into a VM, or that crash the translation.
func FuzzTranslate(f *testing.F) {
	for _, spec := range []*specs.Spec{fullSpec(), generate(f), {}} {
		data, err := json.Marshal(spec)
		require.NoError(f, err)
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var host specs.Spec
		if json.Unmarshal(data, &host) != nil {
			return
		}
		got, err := Translate(&host, "c", Pod{SandboxPid: testPid})
		if err != nil {
			return
		}
		assert.Equal(t, "/pod/c", got.Spec.Linux.CgroupsPath)
		for _, ns := range got.Spec.Linux.Namespaces {
			assert.Empty(t, ns.Path)
		}
		assert.LessOrEqual(t, len(got.Spec.Linux.UIDMappings), 1)
		assert.Len(t, got.Spec.Linux.GIDMappings, len(got.Spec.Linux.UIDMappings))
		for _, m := range got.Spec.Mounts {
			assert.Contains(t, append([]string{"bind"}, kernelMounts...), m.Type)
		}
		out, err := json.Marshal(got.Spec)
		require.NoError(t, err)
		assert.False(t, bytes.Contains(out, []byte(`"hooks"`)))
	})
}
