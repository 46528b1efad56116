// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package faults

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// misfortune is what befalls a node from outside, for a while.
type misfortune struct {
	name string
	// befall strikes the node or the pod, and returns what undoes it.
	befall func(s *struck) (undo func() error, err error)
	// lasts is how long it is left at that; else as long as it takes to try everything.
	lasts time.Duration
	// pod and others are what the errors of calls say meanwhile, of the pod itself and of
	// others: regular expressions. If empty no call may fail.
	pod, others string
	// ends tells that the pod ends by it, and that another attempt takes its place.
	ends bool
	// kills tells that containerd may end by it.
	kills bool
	// unless says why it cannot be tried here.
	unless func() string
}

// struck is a pod that a misfortune befalls.
type struck struct {
	*world
	k        *kubelet
	vmm      int
	shim     int
	netns    string
	memoryCG string
}

// frozen is for how long a process stands still: as long as the limits of calls are about in
// `make faults`, and long enough to be noticed elsewhere.
var frozen = map[bool]time.Duration{true: 30 * time.Second, false: 5 * time.Second}[os.Getenv("FAULTS") == "all"]

const (
	// full is what a full disk is called.
	full = `no space left on device|Input/output error|I/O error|Read-only file system`
	// tooMany is what is said of too many open files.
	tooMany = `too many open files`
)

var misfortunes = []misfortune{
	{name: "the VMM stands still", befall: freeze(func(s *struck) int { return s.vmm }), lasts: frozen, pod: `deadline exceeded|does not answer|timed out`},
	{name: "the shim stands still", befall: freeze(func(s *struck) int { return s.shim }), lasts: frozen, pod: `deadline exceeded|does not answer|timed out`},
	{name: "containerd stands still", befall: freeze(func(s *struck) int { return s.Pid() }), lasts: frozen},
	{name: "containerd has no file descriptors", befall: noFiles(func(s *struck) int { return s.Pid() }), pod: tooMany, others: tooMany},
	{name: "the shim has no file descriptors", befall: noFiles(func(s *struck) int { return s.shim }), pod: tooMany},
	{name: "the VMM has no file descriptors", befall: noFiles(func(s *struck) int { return s.vmm }), pod: `.`},
	{name: "no process can be made", befall: noProcesses, pod: `.`, others: `.`, kills: true},
	{name: "the kernel kills the VMM", befall: outOfMemory, pod: `.`, ends: true},
	{name: "the network namespace has no name", befall: nameless},
	{name: "the bridge is removed", befall: noBridge},
	{name: "the clock goes an hour ahead", befall: setClock(time.Hour), unless: othersClock},
	{name: "the clock goes an hour back", befall: setClock(-time.Hour), unless: othersClock},
	{name: "the disk of the state is full", befall: fullDisk("run"), pod: full, others: full},
	{name: "containerd's disk is full", befall: fullDisk("state"), pod: full, others: full},
	{name: "the disk of the cache is full", befall: fullDisk("cache"), pod: full, others: full, ends: true},
}

// TestMisfortunes has each befall a pod that runs beside another one. What is tried
// meanwhile fails with words that tell why, or succeeds; afterwards both pods are as before,
// unless the misfortune ends the one, and in the end nothing is left.
func TestMisfortunes(t *testing.T) {
	w := newWorld(t, 0, nil, func(o *testnode.Options) {
		o.Tmpfs = map[string]string{"run": "64m", "state": "64m", "cache": "2g"}
	})
	for _, m := range misfortunes {
		t.Run(m.name, func(t *testing.T) {
			if m.unless != nil && m.unless() != "" {
				t.Skip("NOT TESTED: " + m.unless())
			}
			w.suffer(t, m)
		})
	}
}

func (w *world) suffer(t *testing.T, m misfortune) {
	other := newKubelet(w.Node, "other", w.volume)
	require.NoError(t, other.up(execDone))
	s, err := w.newStruck()
	require.NoError(t, err)
	before, otherBefore := s.k.pod, other.pod
	undo, err := m.befall(s)
	require.NoError(t, err)
	undone := false
	defer func() { // a failure half-way must not be the next one's
		if !undone {
			assert.NoError(t, undo())
		}
	}()
	began := time.Now()
	results := make(chan error, 2)
	go func() { results <- s.k.up(updated) }()
	tried := newKubelet(w.Node, "tried", w.volume)
	go func() { results <- errors.Join(tried.up(updated), tried.down()) }()
	var failures error
	if m.lasts > 0 {
		time.Sleep(m.lasts) // the misfortune itself
	} else {
		failures = errors.Join(<-results, <-results)
	}
	undone = true
	require.NoError(t, undo())
	if m.lasts > 0 {
		failures = errors.Join(<-results, <-results)
	}
	t.Logf("what was tried took %s: %v", time.Since(began).Round(time.Millisecond), failures)
	says(t, s.k, m.pod)
	says(t, tried, m.others)
	if m.kills {
		died, err := w.heal(time.Second)
		require.NoError(t, err)
		t.Logf("containerd has ended: %v", died)
	}

	// Those who try again succeed.
	require.NoError(t, testnode.Eventually(limited(t), func(context.Context) error { return s.k.up(execDone) }))
	require.NoError(t, testnode.Eventually(limited(t), func(context.Context) error { return other.up(execDone) }))
	assert.Equal(t, otherBefore, other.pod, "the other pod lives on")
	if !m.ends {
		assert.Equal(t, before, s.k.pod, "the pod lives on")
	}
	for _, k := range []*kubelet{s.k, tried, other} {
		require.NoError(t, testnode.Eventually(limited(t), func(context.Context) error { return k.down() }))
	}
	if !assert.NoError(t, w.clean()) {
		w.renew()
	}
}

// says fails unless each failed call tells why.
func says(t *testing.T, k *kubelet, why string) {
	t.Helper()
	for _, c := range k.failed() {
		if why == "" {
			assert.NoError(t, c.err, "%s: nothing may fail", c.verb)
			continue
		}
		assert.Regexp(t, regexp.MustCompile("(?i)"+why), c.err.Error(), c.verb)
	}
}

func limited(t *testing.T) context.Context {
	ctx, cancel := limit(restLimit)
	t.Cleanup(cancel)
	return ctx
}

// newStruck brings up the pod that is to be struck, and finds its processes.
func (w *world) newStruck() (*struck, error) {
	s := &struck{world: w, k: newKubelet(w.Node, "struck", w.volume)}
	if err := s.k.up(execDone); err != nil {
		return nil, err
	}
	ctx, cancel := limit(callLimit)
	defer cancel()
	st, err := w.Runtime().PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: s.k.pod, Verbose: true})
	if err != nil {
		return nil, err
	}
	var in struct {
		VMMPid  int    `json:"vmm_pid"`
		ShimPid int    `json:"shim_pid"`
		NetNS   string `json:"netns"`
	}
	if err := json.Unmarshal([]byte(st.GetInfo()["cloudhv"]), &in); err != nil {
		return nil, err
	}
	s.vmm, s.shim, s.netns = in.VMMPid, in.ShimPid, in.NetNS
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", s.vmm))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(text)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		switch {
		case len(parts) != 3:
		case parts[1] == "memory":
			s.memoryCG = filepath.Join("/sys/fs/cgroup/memory", parts[2])
		case parts[0] == "0" && s.memoryCG == "":
			s.memoryCG = filepath.Join("/sys/fs/cgroup", parts[2])
		}
	}
	return s, nil
}

// freeze stops a process.
func freeze(who func(*struck) int) func(*struck) (func() error, error) {
	return func(s *struck) (func() error, error) {
		pid := who(s)
		return func() error { return unix.Kill(pid, unix.SIGCONT) }, unix.Kill(pid, unix.SIGSTOP)
	}
}

// noFiles lets a process open as many files as it has, and no more.
func noFiles(who func(*struck) int) func(*struck) (func() error, error) {
	return func(s *struck) (func() error, error) {
		pid := who(s)
		open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		if err != nil {
			return nil, err
		}
		var before unix.Rlimit
		if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &before); err != nil {
			return nil, err
		}
		limited := before
		limited.Cur = uint64(len(open)) + 1
		return func() error { return unix.Prlimit(pid, unix.RLIMIT_NOFILE, &before, nil) }, unix.Prlimit(pid, unix.RLIMIT_NOFILE, &limited, nil)
	}
}

// noProcesses puts containerd into a cgroup that has no room for another task.
func noProcesses(s *struck) (func() error, error) {
	root := "/sys/fs/cgroup/pids"
	if _, err := os.Stat(root); err != nil {
		root = "/sys/fs/cgroup"
	}
	pid := strconv.Itoa(s.Pid())
	text, err := os.ReadFile("/proc/" + pid + "/cgroup")
	if err != nil {
		return nil, err
	}
	before := root
	for line := range strings.Lines(string(text)) {
		if parts := strings.SplitN(strings.TrimSpace(line), ":", 3); len(parts) == 3 && (parts[1] == "pids" || parts[0] == "0" && before == root) {
			before = filepath.Join(root, parts[2])
		}
	}
	dir := filepath.Join(root, "chv-full")
	if err := os.Mkdir(dir, 0o755); err != nil { //nolint:gosec // a cgroup is everybody's to read
		return nil, err
	}
	threads, err := os.ReadDir("/proc/" + pid + "/task")
	if err != nil {
		return nil, err
	}
	write := func(dir, file, text string) error { return os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644) }
	undo := func() error {
		// It may have ended, by having no thread.
		_ = write(before, "cgroup.procs", pid)
		return testnode.Eventually(context.Background(), func(context.Context) error { return os.Remove(dir) })
	}
	return undo, errors.Join(write(dir, "cgroup.procs", pid), write(dir, "pids.max", strconv.Itoa(len(threads))))
}

// outOfMemory lets the pod's cgroup have little more memory than it has, and the guest take
// more.
func outOfMemory(s *struck) (func() error, error) {
	usage, limit := "memory.usage_in_bytes", "memory.limit_in_bytes"
	if _, err := os.Stat(filepath.Join(s.memoryCG, usage)); err != nil {
		usage, limit = "memory.current", "memory.max"
	}
	text, err := os.ReadFile(filepath.Join(s.memoryCG, usage))
	if err != nil {
		return nil, err
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(s.memoryCG, limit), []byte(strconv.FormatInt(n+2<<20, 10)), 0o644); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), testnode.Scale(callLimit))
	defer cancel()
	_, _, _, err = s.ExecSync(ctx, s.k.container, "/bin/sh", "-c", "head -c 25000000 /dev/zero | tail >/dev/null")
	if err == nil {
		return nil, fmt.Errorf("the guest had its memory: %w", errdefs.ErrFailedPrecondition)
	}
	return func() error { return nil }, nil
}

// nameless removes the name of the pod's network namespace, as `ip netns delete` does.
func nameless(s *struck) (func() error, error) {
	return func() error { return nil }, errors.Join(unix.Unmount(s.netns, unix.MNT_DETACH), os.Remove(s.netns))
}

// noBridge removes the bridge of all pods.
func noBridge(s *struck) (func() error, error) {
	link, err := netlink.LinkByName(s.Bridge())
	if err != nil {
		return nil, err
	}
	return func() error { return nil }, netlink.LinkDel(link)
}

// othersClock says why the clock cannot be set.
func othersClock() string {
	if os.Getenv("E2E_CLOCK") != "1" {
		return "the host's clock is everybody's; the emulated node has one of its own (make test-kvm SUITE=faults), which E2E_CLOCK=1 tells"
	}
	return ""
}

// setClock sets the host's clock, and returns when the guest has followed.
func setClock(by time.Duration) func(*struck) (func() error, error) {
	set := func(s *struck, by time.Duration) error {
		var now unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_REALTIME, &now); err != nil {
			return err
		}
		then := unix.NsecToTimespec(now.Nano() + by.Nanoseconds())
		if err := unix.ClockSettime(unix.CLOCK_REALTIME, &then); err != nil {
			return err
		}
		ctx, cancel := limit(30 * time.Second)
		defer cancel()
		return testnode.Eventually(ctx, func(ctx context.Context) error {
			out, _, _, err := s.ExecSync(ctx, s.k.container, "date", "+%s")
			if err != nil {
				return err
			}
			inside, err := strconv.ParseInt(strings.TrimSpace(out), 10, 64)
			if err != nil {
				return err
			}
			// A command takes a while to start.
			if behind := time.Now().Unix() - inside; behind < -1 || behind > 5 {
				return fmt.Errorf("the guest's clock is %d s behind: %w", behind, errdefs.ErrFailedPrecondition)
			}
			return nil
		})
	}
	return func(s *struck) (func() error, error) {
		return func() error { return set(s, -by) }, set(s, by)
	}
}

// fullDisk leaves no room on a file system.
func fullDisk(which string) func(*struck) (func() error, error) {
	return func(s *struck) (func() error, error) {
		file := s.Dir(which, "full")
		f, err := os.Create(file)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		block := make([]byte, 1<<20)
		for err == nil {
			_, err = f.Write(block)
		}
		if !errors.Is(err, unix.ENOSPC) {
			return nil, errors.Join(err, os.Remove(file))
		}
		return func() error { return os.Remove(file) }, nil
	}
}
