// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testimage/pattern"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// The limits of the network "slow", in bits a second.
const (
	ingressRate = 16_000_000
	egressRate  = 8_000_000
)

// sameBridge is the plugin firewall, by which pods on different bridges do not reach
// each other.
var sameBridge = map[string]any{"type": "firewall", "backend": "iptables", "ingressPolicy": "same-bridge"}

// networks are those of the node that TestNetworks runs on. LAN 1 has jumbo frames.
var networks = []testnode.Network{
	{Name: "lan", Chains: []testnode.Chain{{Plugins: []map[string]any{
		{"type": "portmap", "snat": true, "capabilities": map[string]bool{"portMappings": true}},
	}}}},
	{Name: "jumbo", Chains: []testnode.Chain{{LAN: 1}}},
	{Name: "six", Chains: []testnode.Chain{{OnlyIPv6: true}}},
	// Both have default routes: what counts is the order in which the plugins came.
	{Name: "two", Chains: []testnode.Chain{{}, {LAN: 1}}},
	{Name: "sbr", Chains: []testnode.Chain{{}, {LAN: 1, Plugins: []map[string]any{{"type": "sbr"}}}}},
	{Name: "script", Chains: []testnode.Chain{{Plugins: []map[string]any{{"type": scriptPlugin}}}}},
	{Name: "slow", Chains: []testnode.Chain{{Plugins: []map[string]any{{
		"type": "bandwidth", "ingressRate": ingressRate, "ingressBurst": burst, "egressRate": egressRate, "egressBurst": burst,
	}}}}},
	{Name: "fwa", Chains: []testnode.Chain{{Plugins: []map[string]any{sameBridge}}}},
	{Name: "fwb", Chains: []testnode.Chain{{LAN: 1, Plugins: []map[string]any{sameBridge}}}},
}

// aFew are the bytes of a transfer that is to tell whether there is a way.
const aFew = 256 << 10

// burst is how many bits pass at once, whatever the rate.
const burst = 2_000_000

// TestNetworks runs pods by both handlers in networks of many kinds, as CNI plugins make
// them: all on one node, which has a CNI configuration for each.
func TestNetworks(t *testing.T) {
	n := ownNode(t, map[string]any{"pool": map[string]any{"min": 0, "max": 0}}, func(o *testnode.Options) { o.Networks = networks })
	missing := n.MissingPlugins(scriptPlugin)
	if _, err := exec.LookPath("iptables"); err != nil {
		missing = append(missing, "the program iptables")
	}
	if len(missing) > 0 {
		t.Skipf("NOT TESTED: this host has no %s", strings.Join(missing, ", "))
	}
	img, err := testimage.Helper(suite.helper)
	require.NoError(t, err)
	require.NoError(t, n.Import(testContext(t), testimage.HelperRef, img))
	for _, test := range []struct {
		name string
		run  func(lab)
	}{
		{"IPv6Only", networkIPv6Only},
		{"Interfaces", networkInterfaces},
		{"Bridges", networkBridges},
		{"Routes", networkRoutes},
		{"Bandwidth", networkBandwidth},
		{"Firewall", networkFirewall},
		{"DNS", networkDNS},
		{"FailedAdd", networkFailedAdd},
		{"FailedDelete", networkFailedDelete},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, h := range suite.handlers {
				t.Run(h, func(t *testing.T) { test.run(lab{T: t, n: n, h: h}) })
			}
		})
	}
}

// lab is the node of TestNetworks, and the handler that a test runs pods by.
type lab struct {
	*testing.T
	n *testnode.Node
	h string
}

// handler is that for pods in a network.
func (l lab) handler(network string) string { return testnode.Network{Name: network}.Handler(l.h) }

// pod runs a pod in a network, and removes it when the test ends.
func (l lab) pod(network string, change ...func(*runtimeapi.PodSandboxConfig)) *pod {
	l.Helper()
	p := &pod{t: l.T, n: l.n, handler: l.handler(network), cfg: l.n.PodConfig(network)}
	for _, c := range change {
		c(p.cfg)
	}
	id, err := l.n.RunPod(testContext(l.T), p.cfg, p.handler)
	require.NoError(l, err, l.n.LogTail(4000))
	p.id = id
	l.Cleanup(p.remove)
	return p
}

// server runs a pod that answers by TCP and UDP.
func (l lab) server(network string, change ...func(*runtimeapi.PodSandboxConfig)) *container {
	l.Helper()
	c := l.pod(network, change...).start(shellConfig("server", fmt.Sprintf("%[1]s echo %[2]s & exec %[1]s serve %[2]s", testimage.HelperPath, port)))
	c.awaitLog(func(lines []logLine) bool { return len(lines) >= 2 })
	return c
}

// needIPv6 skips a test that is of nothing else.
func (l lab) needIPv6() {
	l.Helper()
	if len(l.n.HostIPs()) < 2 {
		l.Skip("NOT TESTED: this host has no IPv6")
	}
}

// serverAt is the address of a server.
func serverAt(ip string) string { return net.JoinHostPort(ip, port) }

// reach has the container get and send bytes.
func (c *container) reach(what, ip string) { c.transfer(c.t, what, serverAt(ip), aFew) }

// refused checks that the container gets no connection within two seconds.
func (c *container) refused(ip string) {
	c.t.Helper()
	_, _, code, err := c.n.ExecSync(testContext(c.t), c.id, "timeout", "2", testimage.HelperPath, "recv", serverAt(ip), "1", "1")
	require.NoError(c.t, err)
	require.NotZero(c.t, code, "%s is reached", ip)
}

// probe tells what becomes of unfragmented packets of these sizes that the container
// sends.
func (c *container) probe(ip string, sizes ...int) string {
	c.t.Helper()
	args := []string{testimage.HelperPath, "probe", serverAt(ip)}
	for _, s := range sizes {
		args = append(args, strconv.Itoa(s))
	}
	return c.exec(args...)
}

// hostEcho answers datagrams on one of the host's addresses until the test ends.
func hostEcho(t *testing.T, ip netip.Addr) {
	t.Helper()
	conn, err := pattern.ListenEcho("udp", serverAt(ip.String()))
	require.NoError(t, err)
	ended := make(chan error)
	go func() { ended <- pattern.Echo(conn) }()
	t.Cleanup(func() {
		conn.Close()
		<-ended
	})
}

// hostProbe is probe from the host.
func hostProbe(t *testing.T, ip string, size int) error {
	t.Helper()
	return pattern.Probe(serverAt(ip), size, testnode.Scale(10*time.Second))
}

// scriptPlugin is a CNI plugin for chains: it is this program, which runs the shell
// scripts that setScript has put beside it, in the pod's network namespace where there
// is one.
const scriptPlugin = "script"

// setScript sets what the plugin does at one of CNI's commands until the test ends, ADD or
// DEL. An empty script does nothing.
func (l lab) setScript(command, text string) {
	l.Helper()
	self, err := os.Executable()
	require.NoError(l, err)
	plugin := filepath.Join(l.n.CNIBinDir(), scriptPlugin)
	if err := os.Symlink(self, plugin); !errors.Is(err, fs.ErrExist) {
		require.NoError(l, err)
	}
	file := plugin + "." + command
	require.NoError(l, os.WriteFile(file, []byte(text), 0o644))
	l.Cleanup(func() { require.NoError(l, os.RemoveAll(file)) })
}

// runPlugin is the plugin's main. What a script says is the error if it fails.
func runPlugin(command string, in io.Reader, out io.Writer) int {
	var conf struct {
		CNIVersion string          `json:"cniVersion"`
		PrevResult json.RawMessage `json:"prevResult"`
	}
	err := json.NewDecoder(in).Decode(&conf)
	if err == nil {
		err = runScript(os.Args[0]+"."+command, os.Getenv("CNI_NETNS"))
	}
	switch {
	case err != nil:
		_ = json.NewEncoder(out).Encode(map[string]any{"cniVersion": conf.CNIVersion, "code": 100, "msg": err.Error()})
		return 1
	case command == "ADD":
		_, _ = out.Write(conf.PrevResult)
	}
	return 0
}

func runScript(file, netns string) error {
	if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	args := []string{"sh", "-e", file}
	if netns != "" {
		args = append([]string{"nsenter", "--net=" + netns, "--"}, args...)
	}
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w", strings.TrimSpace(string(bytes.ToValidUTF8(out, nil))), err)
	}
	return nil
}
