// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// attack is what a guest does to its host, in testimage/hostile's words.
type attack struct {
	mode string
	// meanwhile looks at what becomes of the pod's own calls.
	meanwhile func(t *testing.T, c *container)
	// lost is why the pod ends by itself; empty if it goes on, until it is stopped.
	lost string
	// stopped is what is said of a pod that was stopped; empty for nothing special.
	stopped string
	// busy is what containerd may take of a processor for the pod's own sake.
	busy float64
}

var attacks = []attack{
	// The yardstick: it burns its processors, and is otherwise an agent.
	{mode: "spin", meanwhile: answers},
	{mode: "wrong", meanwhile: answersWrongly},
	{mode: "huge", lost: "the guest sent an answer of"},
	{mode: "many", meanwhile: asks, lost: "answers to"},
	{mode: "late", meanwhile: answers},
	{mode: "silent", stopped: "the guest has not answered for"},
	{mode: "noise-pod", lost: "connection"},
	{mode: "noise-vm"},
	{mode: "idle-pod", stopped: "the guest has not answered for"},
	{mode: "idle-vm", meanwhile: answers},
	{mode: "stray-vm", meanwhile: answers},
	{mode: "console", meanwhile: answers},
	// CRI writes the container's log, which takes what it takes of any container.
	{mode: "output", meanwhile: answers, busy: 1.5},
	{mode: "forward", meanwhile: forwards},
	{mode: "volumes", meanwhile: answers},
}

// TestHostileGuest has guests whose agent was replaced attack what the host has for them:
// tasks, streams, port-forwards, volumes, the console, statistics and the machine's service.
// Of each the pod ends as it should or is stopped, in time and with its reason, and
// meanwhile the node and another pod go on as beside a guest that is busy and honest.
func TestHostileGuest(t *testing.T) {
	requireCloudHV(t)
	dir := openDir(t)
	image := filepath.Join(dir, "hostile.erofs")
	guestDir := filepath.Dir(guestFile(t, "agent"))
	require.NoError(t, testimage.HostileGuest(node(t).Repo(), guestDir, t.TempDir(), image))
	n := ownNode(t, map[string]any{"image": image, "pool": map[string]any{"min": 0, "max": 0}, "clock_sync": "5s"},
		func(o *testnode.Options) { o.Metrics = freeAddress(t) })
	img, err := testimage.Helper(suite.helper)
	require.NoError(t, err)
	require.NoError(t, n.Import(testContext(t), testimage.HelperRef, img))
	require.NoError(t, n.AwaitSnapshot(testContext(t)))
	neighbour := podOn(t, n)
	h := &victims{n: n, other: neighbour.idle("neighbour")}
	h.other.exec("true")
	before, err := settled(testContext(t), n)
	require.NoError(t, err)
	for _, a := range attacks {
		if !t.Run(a.mode, func(t *testing.T) { h.suffer(t, a) }) && a.mode == "spin" {
			return
		}
	}
	h.other.exec("true")
	require.NoError(t, n.AwaitCensus(testContext(t), before), "what is left of them")
}

// guestFile is a file of the guest that the tests run.
func guestFile(t *testing.T, name string) string {
	t.Helper()
	dir := os.Getenv("E2E_GUEST")
	if dir == "" {
		dir = filepath.Join(node(t).Repo(), "build", "guest")
	}
	path := filepath.Join(dir, name)
	if _, err := os.Stat(path); err != nil {
		t.Skipf("the guest's image cannot be made again: %v", err)
	}
	return path
}

// victims are the node and another pod, and how they fared beside the yardstick.
type victims struct {
	n     *testnode.Node
	other *container
	usual sufferings
}

// suffer has one guest attack, for some seconds, and ends it.
func (h *victims) suffer(t *testing.T, a attack) {
	share := openDir(t)
	secret := filepath.Join(filepath.Dir(share), "outside-"+filepath.Base(share))
	require.NoError(t, os.WriteFile(secret, []byte("outside"), 0o600))
	defer os.Remove(secret)
	p := podBy(t, h.n, testnode.CloudHV, func(cfg *runtimeapi.PodSandboxConfig) {
		cfg.Annotations = map[string]string{"io.cloudhv.kernel_params": "hostile=" + a.mode}
		limitProcessors(t, cfg.GetLinux().GetCgroupParent())
	})
	c := &container{pod: p, id: p.create(withMounts(helperConfig("c", "term", "0"), &runtimeapi.Mount{ContainerPath: "/v", HostPath: share})).id}
	p.awaitGroups(p.group())
	shim, containerd := p.info().ShimPid, h.n.Pid()
	rss := memoryOf(t, containerd, "VmRSS:")
	require.NoError(t, h.n.StartContainer(testContext(t), c.id))
	done := make(chan struct{})
	go func() {
		defer close(done)
		if a.meanwhile != nil {
			a.meanwhile(t, c)
		}
	}()
	got := h.measure(t)
	shimRSS := memoryOf(t, shim, "VmHWM:")
	grown := memoryOf(t, containerd, "VmRSS:") - rss
	<-done
	t.Logf("%s; containerd has %d MiB more, the shim had %d MiB at most, the pod's files take %d KiB",
		got, grown>>20, shimRSS>>20, sizeOf(t, filepath.Join(h.n.StateDir(), p.id))>>10)
	if a.mode == "spin" {
		h.usual = got
	}
	h.compare(t, a, got)
	assert.Less(t, grown, int64(96<<20), "containerd's memory")
	assert.Less(t, shimRSS, int64(160<<20), "the shim's memory")
	assert.Less(t, sizeOf(t, filepath.Join(h.n.StateDir(), p.id)), int64(4<<20), "the pod's files on the host")
	content, err := os.ReadFile(secret)
	require.NoError(t, err)
	assert.Equal(t, "outside", string(content))
	h.end(t, a, c)
}

// end sees the pod's end, and removes it.
func (h *victims) end(t *testing.T, a attack, c *container) {
	if a.lost != "" {
		st := c.awaitExit()
		assert.Equal(t, int32(137), st.GetExitCode())
		c.awaitNotReady()
		assert.Contains(t, c.info().Cause, a.lost)
	}
	within(t, 90*time.Second, "stopping the container", func() {
		require.NoError(t, h.n.StopContainer(testContext(t), c.id, time.Second))
	})
	within(t, 60*time.Second, "stopping the pod", func() { require.NoError(t, h.n.StopPod(testContext(t), c.pod.id)) })
	if a.stopped != "" {
		assert.Contains(t, c.info().Cause, a.stopped)
	}
	assert.Equal(t, runtimeapi.ContainerState_CONTAINER_EXITED, c.status().GetState())
	for _, line := range hostileLines(t, h.n, c.pod.id) {
		assert.NotContains(t, line, "\x1b")
		assert.False(t, strings.HasPrefix(line, "time=now"), "a forged line: %s", line)
	}
	within(t, 60*time.Second, "removing the pod", func() { require.NoError(t, h.n.RemovePod(testContext(t), c.pod.id)) })
}

// hostileLines are the lines that this process and the shim have logged: the console is
// the guest's own.
func hostileLines(t *testing.T, n *testnode.Node, id string) []string {
	t.Helper()
	var lines []string
	for _, path := range []string{n.LogPath(), filepath.Join(n.StateDir(), id, "shim.log")} {
		text, err := os.ReadFile(path)
		require.NoError(t, err)
		lines = append(lines, strings.Split(string(text), "\n")...)
	}
	return lines
}

// limitProcessors gives a pod one processor by its cgroup, which it makes, as kubelet does.
func limitProcessors(t *testing.T, group string) {
	t.Helper()
	for file, value := range map[string]string{"cpu.max": "100000 100000", "cpu/cpu.cfs_quota_us": "100000"} {
		dir, name := filepath.Split(file)
		if _, err := os.Stat(filepath.Join("/sys/fs/cgroup", dir, "cgroup.procs")); err != nil {
			continue
		}
		require.NoError(t, os.MkdirAll(filepath.Join("/sys/fs/cgroup", dir, group), 0o755))
		// On cgroup v2 the groups above may not hand down the controller yet.
		err := os.WriteFile(filepath.Join("/sys/fs/cgroup", dir, group, name), []byte(value), 0)
		require.True(t, err == nil || errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission), "%v", err)
	}
}

// answers asks the guest's agent for what an honest one would do.
func answers(t *testing.T, c *container) {
	out, errOut, code, err := c.n.ExecSync(testContext(t), c.id, "anything")
	if assert.NoError(t, err) {
		assert.Equal(t, "ok\n", out, errOut)
		assert.Zero(t, code)
	}
	asks(t, c)
}

// asks asks for statistics, which may be refused.
func asks(t *testing.T, c *container) {
	ctx, cancel := context.WithTimeout(context.Background(), testnode.Scale(20*time.Second))
	defer cancel()
	_, _, _, _ = c.n.ExecSync(ctx, c.id, "anything")
	_, err := c.n.Runtime().ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{})
	assert.NoError(t, err)
}

// answersWrongly gets an error that is harmless, for what the guest says.
func answersWrongly(t *testing.T, c *container) {
	_, _, _, err := c.n.ExecSync(testContext(t), c.id, "anything")
	if assert.Error(t, err) {
		assert.Contains(t, err.Error(), "the guest answered pid 4294967295")
		assert.NotContains(t, err.Error(), "\x1b")
		assert.Less(t, len(err.Error()), 8<<10)
	}
	asks(t, c)
}

// forwards connects to the pod by port-forwards, reads a little of each and no more.
func forwards(t *testing.T, c *container) {
	space := c.netNS(t)
	var conns []net.Conn
	defer func() {
		for _, conn := range conns {
			_ = conn.Close()
		}
	}()
	for range 100 {
		conn, err := dialInside(space, "127.0.0.1:80")
		if !assert.NoError(t, err) {
			return
		}
		conns = append(conns, conn)
		_ = conn.SetDeadline(time.Now().Add(testnode.Scale(20 * time.Second)))
		_, err = io.ReadFull(conn, make([]byte, 100))
		assert.NoError(t, err)
	}
	time.Sleep(suffering / 2)
}

// sizeOf is what the files below a directory take.
func sizeOf(t *testing.T, dir string) (bytes int64) {
	t.Helper()
	require.NoError(t, filepath.Walk(dir, func(_ string, info os.FileInfo, err error) error {
		if err == nil && info.Mode().IsRegular() {
			bytes += info.Size()
		}
		return nil
	}))
	return bytes
}

// memoryOf reads a size of a process's status, in bytes.
func memoryOf(t *testing.T, pid int, name string) int64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	require.NoError(t, err)
	var kib int64
	_, err = fmt.Sscanf(field(string(text), name), "%d kB", &kib)
	require.NoError(t, err, errdefs.ErrNotFound)
	return kib << 10
}
