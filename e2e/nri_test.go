// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"context"
	"testing"

	nri "github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// adjustments are what a plugin of NRI does to containers, by their names.
type adjustments map[string]func(*nri.ContainerAdjustment)

// CreateContainer implements stub.CreateContainerInterface.
func (a adjustments) CreateContainer(_ context.Context, _ *nri.PodSandbox, c *nri.Container) (*nri.ContainerAdjustment, []*nri.ContainerUpdate, error) {
	change := a[c.GetName()]
	if change == nil {
		return nil, nil, nil
	}
	out := &nri.ContainerAdjustment{}
	change(out)
	return out, nil, nil
}

// connect makes them the node's only plugin until the test ends.
func (a adjustments) connect(t *testing.T, n *testnode.Node) {
	t.Helper()
	s, err := stub.New(a, stub.WithPluginName("chv-test"), stub.WithPluginIdx("10"), stub.WithSocketPath(n.NRISocket()))
	require.NoError(t, err)
	require.NoError(t, s.Start(testContext(t)))
	t.Cleanup(s.Stop)
}

// TestNRI has a plugin adjust containers: what means something in a VM works as it
// does by runc.
func TestNRI(t *testing.T) {
	a := adjustments{
		"rlimits": func(c *nri.ContainerAdjustment) {
			c.AddRlimit("RLIMIT_NOFILE", 3456, 2345)
			c.AddRlimit("RLIMIT_CORE", 0, 0)
		},
		"env":    func(c *nri.ContainerAdjustment) { c.AddEnv("OF_PLUGIN", "yes") },
		"memory": func(c *nri.ContainerAdjustment) { c.SetLinuxMemoryLimit(80 * mib) },
		"pids":   func(c *nri.ContainerAdjustment) { c.SetLinuxPidLimits(33) },
		"device": func(c *nri.ContainerAdjustment) {
			c.AddDevice(&nri.LinuxDevice{Path: "/dev/of-plugin", Type: "c", Major: 1, Minor: 5})
		},
		"tmpfs": func(c *nri.ContainerAdjustment) {
			c.AddMount(&nri.Mount{Destination: "/of-plugin", Type: "tmpfs", Source: "tmpfs", Options: []string{"size=1m"}})
		},
	}
	want := map[string][2]string{
		"rlimits": {"ulimit -n; ulimit -Hn; ulimit -c", "2345\n3456\n0\n"},
		"env":     {"echo $OF_PLUGIN", "yes\n"},
		"memory":  {"cd /sys/fs/cgroup; cat memory.max 2>/dev/null || cat memory/memory.limit_in_bytes", "83886080\n"},
		"pids":    {"cd /sys/fs/cgroup; cat pids.max 2>/dev/null || cat pids/pids.max", "33\n"},
		"device":  {"head -c 4 /dev/of-plugin | wc -c", "4\n"},
		"tmpfs":   {"df -k /of-plugin | awk 'END { print $2 }'", "1024\n"},
	}
	forHandlers(t, func(t *testing.T, h string) {
		a.connect(t, node(t))
		p := newPod(t, h)
		for name, tc := range want {
			c := p.start(shellConfig(name, tc[0]))
			assert.Zero(t, c.awaitExit().GetExitCode(), name)
			assert.Equal(t, tc[1], c.text("stdout"), name)
		}
	})
}

// TestNRIRefused has a plugin ask for what is the host's: each is refused by its name,
// and nothing is left.
func TestNRIRefused(t *testing.T) {
	requireCloudHV(t)
	a := adjustments{}
	words := map[string][]string{}
	for _, tc := range []struct {
		name   string
		change func(*nri.ContainerAdjustment)
		words  []string
	}{
		{"hook", func(c *nri.ContainerAdjustment) {
			c.AddHooks(&nri.Hooks{Prestart: []*nri.Hook{{Path: "/usr/bin/of-host"}}})
		}, []string{"hooks.prestart", "/usr/bin/of-host", "a hook is a program of the host"}},
		{"device", func(c *nri.ContainerAdjustment) {
			c.AddDevice(&nri.LinuxDevice{Path: "/dev/gpu0", Type: "c", Major: 195})
		}, []string{"linux.devices", "/dev/gpu0 (c 195:0)", "not in a VM"}},
		{"sysctl", func(c *nri.ContainerAdjustment) { c.SetLinuxSysctl("net.ipv4.ip_forward", "1") },
			[]string{"linux.sysctl", "net.ipv4.ip_forward", "the pod's security context"}},
		{"namespace", func(c *nri.ContainerAdjustment) {
			c.AddOrReplaceNamespace(&nri.LinuxNamespace{Type: "network", Path: "/proc/1/ns/net"})
		}, []string{"linux.namespaces.network", "/proc/1/ns/net"}},
		{"unified", func(c *nri.ContainerAdjustment) { c.AddLinuxUnified("io.weight", "100") }, []string{"linux.resources.unified", "io.weight"}},
		{"scheduler", func(c *nri.ContainerAdjustment) {
			c.SetLinuxScheduler(&nri.LinuxScheduler{Policy: nri.LinuxSchedulerPolicy_SCHED_BATCH})
		}, []string{"process.scheduler"}},
		{"annotation", func(c *nri.ContainerAdjustment) { c.AddAnnotation("io.cloudhv.gpu", "all") }, []string{"annotations.io.cloudhv.gpu"}},
	} {
		a[tc.name], words[tc.name] = tc.change, tc.words
	}
	p := newPod(t, testnode.CloudHV)
	idle := p.idle("idle")
	a.connect(t, p.n)
	before, err := settled(testContext(t), p.n)
	require.NoError(t, err)
	for name := range a {
		id, err := p.n.CreateContainer(testContext(t), p.id, p.cfg, idleConfig(name))
		if err == nil {
			err = p.n.StartContainer(testContext(t), id)
			assert.NoError(t, p.n.RemoveContainer(testContext(t), id), name)
		}
		if !assert.Error(t, err, name) {
			continue
		}
		for _, w := range words[name] {
			assert.ErrorContains(t, err, w, name)
		}
	}
	idle.exec("true")
	require.NoError(t, p.n.AwaitCensus(testContext(t), before))
}
