// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// namespaceOptions changes a pod's.
func namespaceOptions(change func(*runtimeapi.NamespaceOption)) func(*runtimeapi.PodSandboxConfig) {
	return func(cfg *runtimeapi.PodSandboxConfig) {
		change(cfg.GetLinux().GetSecurityContext().GetNamespaceOptions())
	}
}

// refusedPods are pods that cannot be, and what is said of each: the field with its
// value, and the reason.
var refusedPods = []struct {
	name   string
	change func(*runtimeapi.PodSandboxConfig)
	words  []string
}{
	{"hostNetwork", namespaceOptions(func(o *runtimeapi.NamespaceOption) { o.Network = runtimeapi.NamespaceMode_NODE }),
		[]string{"linux.security_context.namespace_options.network = NODE", "cannot use the host's"}},
	{"hostPID", namespaceOptions(func(o *runtimeapi.NamespaceOption) { o.Pid = runtimeapi.NamespaceMode_NODE }),
		[]string{"linux.security_context.namespace_options.pid = NODE", "cannot see the host's processes"}},
	{"hostIPC", namespaceOptions(func(o *runtimeapi.NamespaceOption) { o.Ipc = runtimeapi.NamespaceMode_NODE }),
		[]string{"linux.security_context.namespace_options.ipc = NODE", "cannot share the host's IPC"}},
	{"memory beyond the host", func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 10 << 40}
	}, []string{"linux.resources.memory_limit_in_bytes = 10995116277760", "must be at most", "max_memory"}},
	{"unknown annotation", func(cfg *runtimeapi.PodSandboxConfig) { cfg.Annotations["io.cloudhv.gpu"] = "1" },
		[]string{`annotation io.cloudhv.gpu = "1"`, "no such annotation"}},
	{"unknown sysctl", func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Linux.Sysctls = map[string]string{"net.no_such_sysctl": "1"}
	}, []string{"sysctl", "net.no_such_sysctl"}},
	{"wrong value of a sysctl", func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Linux.Sysctls = map[string]string{"net.ipv4.ip_local_port_range": "many"}
	}, []string{"sysctl", "net.ipv4.ip_local_port_range", "many"}},
	{"sysctl that escapes", func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Linux.Sysctls = map[string]string{"net.../../../../etc/passwd": "1"}
	}, []string{"linux.sysctls", "etc/passwd"}},
	{"sysctl of the whole kernel", func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Linux.Sysctls = map[string]string{"kernel.core_pattern": "|/bin/sh"}
	}, []string{`linux.sysctls: sysctl "kernel.core_pattern"`, "a pod may set no other"}},
}

// TestRefusedPods checks that each is an error with the right words, and that nothing
// was made for it.
func TestRefusedPods(t *testing.T) {
	requireCloudHV(t)
	n := node(t)
	before, err := settled(testContext(t), n)
	require.NoError(t, err)
	for _, tc := range refusedPods {
		_, err := n.RunPod(testContext(t), podConfig(t, tc.change), testnode.CloudHV)
		if !assert.Error(t, err, tc.name) {
			continue
		}
		for _, w := range tc.words {
			assert.ErrorContains(t, err, w, tc.name)
		}
	}
	list, err := n.Runtime().ListPodSandbox(testContext(t), &runtimeapi.ListPodSandboxRequest{})
	require.NoError(t, err)
	require.Empty(t, list.GetItems())
	require.NoError(t, n.AwaitCensus(testContext(t), before))
}

// deviceNode makes a device's node, as a driver's would be on a host that has it.
func deviceNode(t *testing.T, name string, mode uint32, major, minor uint32) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	require.NoError(t, unix.Mknod(path, mode|0o600, int(unix.Mkdev(major, minor))))
	return path
}

func device(host, container string) func(*runtimeapi.ContainerConfig) {
	return func(cfg *runtimeapi.ContainerConfig) {
		cfg.Devices = []*runtimeapi.Device{{HostPath: host, ContainerPath: container, Permissions: "rwm"}}
	}
}

func cdiDevice(name string) func(*runtimeapi.ContainerConfig) {
	return func(cfg *runtimeapi.ContainerConfig) {
		cfg.CDIDevices = []*runtimeapi.CDIDevice{{Name: cdiKind + "=" + name}}
	}
}

// cdiKind is the kind of the devices that writeCDI describes.
const cdiKind = "chv.test/device"

// writeCDI describes devices of which one is a node of the host, one needs a hook, and
// one is nothing but a variable.
func writeCDI(t *testing.T, n *testnode.Node) {
	t.Helper()
	edits := func(name string, edits map[string]any) map[string]any {
		return map[string]any{"name": name, "containerEdits": edits}
	}
	b, err := json.Marshal(map[string]any{"cdiVersion": "0.6.0", "kind": cdiKind, "devices": []any{
		edits("env", map[string]any{"env": []string{"FROM_CDI=yes"}}),
		edits("null", map[string]any{"deviceNodes": []any{map[string]any{"path": "/dev/cdi-null", "hostPath": "/dev/null", "type": "c", "major": 1, "minor": 3}}}),
		edits("gpu", map[string]any{"deviceNodes": []any{map[string]any{"path": "/dev/gpu0", "hostPath": "/dev/gpu0", "type": "c", "major": 195, "minor": 0}}}),
		edits("hook", map[string]any{"hooks": []any{map[string]any{"hookName": "createContainer", "path": "/usr/bin/device-ctk"}}}),
	}})
	require.NoError(t, err)
	require.NoError(t, os.MkdirAll(n.CDIDir(), 0o755))
	file := filepath.Join(n.CDIDir(), "chv.json")
	require.NoError(t, os.WriteFile(file, b, 0o644))
	t.Cleanup(func() { require.NoError(t, os.Remove(file)) })
}

// sharedMount is a directory from which mounts would propagate to the host.
func sharedMount(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, unix.Mount("chv-shared", dir, "tmpfs", 0, "size=64k"))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	require.NoError(t, unix.Mount("", dir, "", unix.MS_SHARED, ""))
	return dir
}

// TestRefusedContainers is the same for containers. A pod that had all of them goes on.
func TestRefusedContainers(t *testing.T) {
	requireCloudHV(t)
	p := newPod(t, testnode.CloudHV)
	writeCDI(t, p.n)
	dir := sharedMount(t)
	idle := p.idle("idle")
	before, err := settled(testContext(t), p.n)
	require.NoError(t, err)
	for i, tc := range []struct {
		name   string
		change func(*runtimeapi.ContainerConfig)
		words  []string
	}{
		{"propagation", func(cfg *runtimeapi.ContainerConfig) {
			cfg.Mounts = []*runtimeapi.Mount{{ContainerPath: "/mnt", HostPath: dir, Propagation: runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL}}
		}, []string{"/mnt", "shared"}},
		{"VFIO", device(deviceNode(t, "vfio7", unix.S_IFCHR, 511, 7), "/dev/vfio/7"), []string{"linux.devices", "/dev/vfio/7 (c 511:7)", "other devices of the host are not in a VM"}},
		{"GPU", device(deviceNode(t, "nvidia0", unix.S_IFCHR, 195, 0), "/dev/nvidia0"), []string{"linux.devices", "/dev/nvidia0 (c 195:0)", "not in a VM"}},
		{"disk that is none", device(deviceNode(t, "sda", unix.S_IFBLK, 4095, 1048575), "/dev/sda"), []string{"block device 4095:1048575", "the host has no such device"}},
		{"KVM", device(deviceNode(t, "kvm", unix.S_IFCHR, 10, 232), "/dev/kvm"), []string{"linux.devices", "/dev/kvm (c 10:232)"}},
		{"GPU by CDI", cdiDevice("gpu"), []string{"linux.devices", "/dev/gpu0 (c 195:0)"}},
		{"hook by CDI", cdiDevice("hook"), []string{"hooks.createContainer", "/usr/bin/device-ctk", "a hook is a program of the host"}},
		{"no such CDI device", cdiDevice("none"), []string{cdiKind + "=none"}},
		{"memory beyond the host", func(cfg *runtimeapi.ContainerConfig) { cfg.Linux.Resources.MemoryLimitInBytes = 10 << 40 }, []string{"memory", "max_memory"}},
		{"unknown annotation", func(cfg *runtimeapi.ContainerConfig) { cfg.Annotations = map[string]string{"io.cloudhv.gpu": "1"} },
			[]string{"annotations.io.cloudhv.gpu", `"1"`, "io.cloudhv.default_memory"}},
		{"seccomp profile that is missing", profile(runtimeapi.SecurityProfile_Localhost, dir+"/none.json"), []string{dir + "/none.json", "no such file"}},
		{"a device of a cgroup", func(cfg *runtimeapi.ContainerConfig) {
			cfg.Linux.Resources.Unified = map[string]string{"io.max": "8:0 rbps=1"}
		}, []string{"linux.resources.unified", "io.max"}},
		{"unknown key of a cgroup", func(cfg *runtimeapi.ContainerConfig) {
			cfg.Linux.Resources.Unified = map[string]string{"memory.no_such": "1"}
		}, []string{"memory.no_such"}},
		{"working directory that is a file", func(cfg *runtimeapi.ContainerConfig) { cfg.WorkingDir = "/etc/passwd" }, []string{"/etc/passwd", "ot a directory"}},
	} {
		cfg := idleConfig(fmt.Sprintf("c%d", i))
		tc.change(cfg)
		id, err := p.n.CreateContainer(testContext(t), p.id, p.cfg, cfg)
		if err == nil {
			err = p.n.StartContainer(testContext(t), id)
			assert.NoError(t, p.n.RemoveContainer(testContext(t), id), tc.name)
		}
		if !assert.Error(t, err, tc.name) {
			continue
		}
		for _, w := range tc.words {
			assert.ErrorContains(t, err, w, tc.name)
		}
	}
	idle.exec("true")
	require.NoError(t, p.n.AwaitCensus(testContext(t), before))
}

// TestDevices checks devices that there are in a VM too: those of Linux itself, by name
// and by CDI.
func TestDevices(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		writeCDI(t, p.n)
		cfg := idleConfig("c")
		device("/dev/null", "/dev/other-null")(cfg)
		cfg.CDIDevices = []*runtimeapi.CDIDevice{{Name: cdiKind + "=env"}, {Name: cdiKind + "=null"}}
		c := p.start(cfg)
		c.awaitLine("ready")
		require.Equal(t, "1 3\n1 3\nyes\n", c.sh("for d in other-null cdi-null; do stat -c '%t %T' /dev/$d; echo x > /dev/$d; done; echo $FROM_CDI"))
		require.Equal(t, "refused\n", c.sh("mknod /dev/sda b 8 0 2>/dev/null && head -c 1 /dev/sda 2>/dev/null || echo refused"))
	})
}

// TestPathsThatEscape runs images whose paths lead out of their root file system. The
// container's files are where they would be in it, and the host's are as they were.
func TestPathsThatEscape(t *testing.T) {
	forHandlers(t, func(t *testing.T, h string) {
		p := newPod(t, h)
		// A container's own process can make any link before an exec names it.
		c := p.idle("c")
		c.sh("ln -s ../../../../../../outside /escape && mkdir -p /outside && echo inside > /outside/file")
		require.Equal(t, "inside\n", c.sh("cat /escape/file"))
		for i, dir := range []string{"/../../../tmp/chv-escape", "/work/../../../../tmp/chv-escape", "/proc/1/root/tmp/chv-escape"} {
			cfg := shellConfig(fmt.Sprintf("d%d", i), "pwd; touch here")
			cfg.WorkingDir = dir
			id, err := p.n.CreateContainer(testContext(t), p.id, p.cfg, cfg)
			if err == nil {
				err = p.n.StartContainer(testContext(t), id)
			}
			t.Logf("%s: %v", dir, err)
			require.NoFileExists(t, "/tmp/chv-escape/here")
			require.NoDirExists(t, "/tmp/chv-escape")
		}
		require.NoDirExists(t, "/outside")
		require.NotContains(t, c.sh("ls /"), "chv-escape")
	})
}
