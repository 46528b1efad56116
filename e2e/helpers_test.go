// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// testLimit bounds one test for one handler.
const testLimit = 5 * time.Minute

// forHandlers runs a test once for each handler.
func forHandlers(t *testing.T, test func(t *testing.T, h string)) {
	node(t)
	for _, h := range suite.handlers {
		t.Run(h, func(t *testing.T) { test(t, h) })
	}
}

// node returns the suite's node, or skips the test. Where an earlier test has
// left it without containerd, it is started again.
func node(t *testing.T) *testnode.Node {
	t.Helper()
	if suite.skip != "" {
		t.Skip(suite.skip)
	}
	require.NoError(t, suite.ctx.Err(), "interrupted")
	if _, said := saidOn.LoadOrStore(t.Name(), true); !said && suite.on != "" {
		t.Log("cloudhv: " + suite.on)
	}
	if suite.node.Pid() == 0 {
		require.NoError(t, suite.node.Start(testContext(t)))
	}
	return suite.node
}

// saidOn are the tests that have said what they run on.
var saidOn sync.Map

// requireCloudHV skips a test of our handler when it is not under test.
func requireCloudHV(t *testing.T) {
	t.Helper()
	node(t)
	if !slices.Contains(suite.handlers, testnode.CloudHV) {
		t.Skip("E2E_HANDLERS leaves cloudhv out")
	}
}

// testContext ends with the test's own time limit.
func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testnode.Scale(testLimit))
	t.Cleanup(cancel)
	return ctx
}

// pod is a running pod of a test.
type pod struct {
	t       *testing.T
	n       *testnode.Node
	handler string
	id      string
	cfg     *runtimeapi.PodSandboxConfig
}

// newPod runs a pod that is removed when the test ends. What change does to its
// configuration is done before.
func newPod(t *testing.T, h string, change ...func(*runtimeapi.PodSandboxConfig)) *pod {
	t.Helper()
	n := node(t)
	cfg := podConfig(t, change...)
	id, err := n.RunPod(testContext(t), cfg, h)
	require.NoError(t, err)
	p := &pod{t: t, n: n, handler: h, id: id, cfg: cfg}
	t.Cleanup(p.remove)
	return p
}

// podConfig is a pod's configuration whose log directory ends with the test.
func podConfig(t *testing.T, change ...func(*runtimeapi.PodSandboxConfig)) *runtimeapi.PodSandboxConfig {
	t.Helper()
	name := strings.ToLower(strings.NewReplacer("/", "-", "_", "-").Replace(strings.TrimPrefix(t.Name(), "Test")))
	cfg := node(t).PodConfig(name[:min(len(name), 40)])
	for _, c := range change {
		c(cfg)
	}
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(cfg.GetLogDirectory())) })
	return cfg
}

// remove ends the pod, after showing its logs if the test has failed.
func (p *pod) remove() {
	if p.t.Failed() {
		p.showLogs()
	}
	ctx, cancel := context.WithTimeout(context.Background(), testnode.Scale(time.Minute))
	defer cancel()
	if err := errors.Join(p.n.StopPod(ctx, p.id), p.n.RemovePod(ctx, p.id)); err != nil {
		p.t.Errorf("the end of the pod: %v", err)
	}
}

// showLogs prints the ends of the logs that tell why something failed.
func (p *pod) showLogs() {
	const tail = 3000
	files, _ := filepath.Glob(filepath.Join(p.n.StateDir(), p.id, "*.log"))
	containers, _ := filepath.Glob(filepath.Join(p.cfg.GetLogDirectory(), "*.log"))
	for _, f := range append(files, containers...) {
		b, err := os.ReadFile(f)
		if err != nil || len(b) == 0 {
			continue
		}
		p.t.Logf("the end of %s:\n%s", filepath.Base(f), b[max(0, len(b)-tail):])
	}
	p.t.Logf("the end of containerd's log:\n%s", p.n.LogTail(tail))
}

// container is a container of a test's pod.
type container struct {
	*pod
	id  string
	log string
}

// helperConfig is the configuration of a container that runs the helper.
func helperConfig(name string, args ...string) *runtimeapi.ContainerConfig {
	return testnode.ContainerConfig(name, testimage.HelperRef, append([]string{testimage.HelperPath}, args...)...)
}

// shellConfig is the configuration of a container that runs a shell script.
func shellConfig(name, script string) *runtimeapi.ContainerConfig {
	return testnode.ContainerConfig(name, testimage.HelperRef, "/bin/sh", "-c", script)
}

// idleConfig is the configuration of a container that ends at once when told.
func idleConfig(name string) *runtimeapi.ContainerConfig { return helperConfig(name, "term", "0") }

// create makes a container.
func (p *pod) create(cfg *runtimeapi.ContainerConfig) *container {
	p.t.Helper()
	id, err := p.n.CreateContainer(testContext(p.t), p.id, p.cfg, cfg)
	require.NoError(p.t, err)
	return &container{pod: p, id: id, log: filepath.Join(p.cfg.GetLogDirectory(), cfg.GetLogPath())}
}

// start makes and starts a container.
func (p *pod) start(cfg *runtimeapi.ContainerConfig) *container {
	p.t.Helper()
	c := p.create(cfg)
	require.NoError(p.t, p.n.StartContainer(testContext(p.t), c.id))
	return c
}

// idle starts a container that waits for SIGTERM, and waits until it does: the
// first process of a PID namespace gets no signal that it does not handle.
func (p *pod) idle(name string) *container {
	p.t.Helper()
	c := p.start(idleConfig(name))
	c.awaitLine("ready")
	return c
}

// ips are the pod's addresses.
func (p *pod) ips() []string {
	p.t.Helper()
	ips, err := p.n.PodIPs(testContext(p.t), p.id)
	require.NoError(p.t, err)
	require.NotEmpty(p.t, ips)
	return ips
}

// state is the pod's state by CRI.
func (p *pod) state() runtimeapi.PodSandboxState {
	p.t.Helper()
	st, err := p.n.Runtime().PodSandboxStatus(testContext(p.t), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id})
	require.NoError(p.t, err)
	return st.GetStatus().GetState()
}

// awaitNotReady waits for the pod to turn NotReady: for the controller, which a
// pod's status asks, and for CRI, which a list asks and which learns it after that.
func (p *pod) awaitNotReady() {
	p.t.Helper()
	require.NoError(p.t, testnode.Eventually(testContext(p.t), func(ctx context.Context) error {
		if s := p.state(); s != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
			return fmt.Errorf("the pod's state is %s", s)
		}
		list, err := p.n.Runtime().ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{Id: p.id}})
		if err != nil {
			return err
		}
		for _, item := range list.GetItems() {
			if item.GetState() != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
				return fmt.Errorf("the pod's state in a list is %s", item.GetState())
			}
		}
		return nil
	}))
}

// exec runs a command that must succeed and returns its standard output.
func (c *container) exec(command ...string) string {
	c.t.Helper()
	out, errOut, code, err := c.n.ExecSync(testContext(c.t), c.id, command...)
	require.NoError(c.t, err)
	require.Zero(c.t, code, "%q exited with %d: %s%s", command, code, out, errOut)
	return out
}

// sh runs a shell script that must succeed.
func (c *container) sh(script string) string {
	c.t.Helper()
	return c.exec("/bin/sh", "-c", script)
}

// status is the container's status by CRI.
func (c *container) status() *runtimeapi.ContainerStatus {
	c.t.Helper()
	st, err := c.n.Runtime().ContainerStatus(testContext(c.t), &runtimeapi.ContainerStatusRequest{ContainerId: c.id})
	require.NoError(c.t, err)
	return st.GetStatus()
}

// awaitExit waits for the container's end and returns its status.
func (c *container) awaitExit() *runtimeapi.ContainerStatus {
	c.t.Helper()
	var st *runtimeapi.ContainerStatus
	require.NoError(c.t, testnode.Eventually(testContext(c.t), func(context.Context) error {
		if st = c.status(); st.GetState() != runtimeapi.ContainerState_CONTAINER_EXITED {
			return fmt.Errorf("the container's state is %s", st.GetState())
		}
		return nil
	}))
	return st
}

// logLine is a line of a container's log, put together if CRI has split it.
type logLine struct {
	stream, text string
	at           time.Time
}

// readLog parses a log of the CRI.
func readLog(path string) ([]logLine, error) {
	var lines []logLine
	err := scanLog(path, func(l logLine) { lines = append(lines, l) })
	return lines, err
}

// scanLog calls f for each line of a CRI log.
func scanLog(path string, f func(logLine)) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	partial := map[string]string{}
	s := bufio.NewScanner(file)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		// 2026-01-02T15:04:05.999999999Z stdout F text
		parts := strings.SplitN(s.Text(), " ", 4)
		if len(parts) != 4 {
			return fmt.Errorf("not a line of a CRI log: %q", s.Text())
		}
		at, err := time.Parse(time.RFC3339Nano, parts[0])
		if err != nil {
			return err
		}
		partial[parts[1]] += parts[3]
		if parts[2] == "F" {
			f(logLine{stream: parts[1], text: partial[parts[1]], at: at})
			delete(partial, parts[1])
		}
	}
	return s.Err()
}

// awaitLog waits until the log has what done wants, and returns it.
func (c *container) awaitLog(done func([]logLine) bool) []logLine {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testnode.Scale(time.Minute))
	defer cancel()
	var lines []logLine
	require.NoError(c.t, testnode.Eventually(ctx, func(context.Context) error {
		var err error
		if lines, err = readLog(c.log); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if !done(lines) {
			return fmt.Errorf("the log has %d lines and not yet the one that is awaited", len(lines))
		}
		return nil
	}))
	return lines
}

// awaitLine waits for a line of the log.
func (c *container) awaitLine(text string) {
	c.t.Helper()
	c.awaitLog(func(lines []logLine) bool {
		for _, l := range lines {
			if l.text == text {
				return true
			}
		}
		return false
	})
}

// class is what an error of a CRI call tells whoever made it, whatever the handler:
// the code, and the step of CRI's that has failed, without its IDs. What comes
// after that are the handler's own words.
func class(err error) string {
	var s interface{ GRPCStatus() *status.Status }
	if err == nil {
		return codes.OK.String()
	}
	if !errors.As(err, &s) {
		return err.Error()
	}
	st := s.GRPCStatus()
	step, _, _ := strings.Cut(st.Message(), ": ")
	return st.Code().String() + ": " + quoted.ReplaceAllString(step, "…")
}

var quoted = regexp.MustCompile(`"[^"]*"`)

// field returns the rest of the line of text that begins with name.
func field(text, name string) string {
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, name); ok {
			return strings.TrimSpace(rest)
		}
	}
	return ""
}
