// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package faults

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
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
	// must tells that a call has to fail, or nothing has been tried.
	must bool
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
	k         *kubelet
	vmm, shim int
	netns     string
}

// frozen is for how long a process stands still: as long as the limits of calls are about in
// `make faults`, and long enough to be noticed elsewhere.
var frozen = map[bool]time.Duration{true: 30 * time.Second, false: 5 * time.Second}[os.Getenv("FAULTS") == "all"]

const (
	// full is what a full disk is called.
	full = `no space left on device|Input/output error|I/O error|Read-only file system`
	// tooMany is what is said of too many open files, and tooLate of who does not answer.
	tooMany = `too many open files`
	tooLate = `deadline exceeded|does not answer|not answer|timed out`
	// noMore is what is said if no process can be made, or if containerd has ended by that.
	noMore = `resource temporarily unavailable|connection refused|error reading from server|transport`
)

var misfortunes = []misfortune{
	{name: "the VMM stands still", befall: freeze(vmmOf), lasts: frozen, pod: tooLate},
	{name: "the shim stands still", befall: freeze(shimOf), lasts: frozen, pod: tooLate},
	{name: "containerd stands still", befall: freeze(containerdOf), lasts: frozen},
	{name: "containerd has no file descriptors", befall: noFiles(containerdOf), pod: tooMany, others: tooMany, must: true},
	{name: "the shim has no file descriptors", befall: noFiles(shimOf), pod: tooMany, must: true},
	{name: "the VMM has no file descriptors", befall: plugging(noFiles(vmmOf)), pod: `file descriptor|` + tooMany, must: true, unless: noResource},
	{name: "no process can be made", befall: noProcesses, pod: noMore, others: noMore, kills: true, must: true},
	{name: "the kernel kills the VMM", befall: outOfMemory, ends: true},
	{name: "the network namespace has no name", befall: nameless},
	{name: "the bridge is removed", befall: noBridge},
	{name: "the clock goes an hour ahead", befall: setClock(time.Hour), unless: othersClock},
	{name: "the clock goes an hour back", befall: setClock(-time.Hour), unless: othersClock},
	{name: "the disk of the state is full", befall: fullDisk("run"), pod: full, others: full, must: true},
	{name: "containerd's disk is full", befall: fullDisk("state"), pod: full, others: full, must: true},
	{name: "the disk of the cache is full", befall: fullDisk("cache"), pod: full, others: full, must: true},
}

// TestMisfortunes has each befall a pod that runs beside another one. What is tried
// meanwhile fails with words that tell why, or succeeds; afterwards both pods are as before,
// unless the misfortune ends the one, and in the end nothing is left.
func TestMisfortunes(t *testing.T) {
	w := newWorld(t, 0, nil, func(o *testnode.Options) {
		o.Tmpfs = map[string]string{"run": "64m", "state": "64m", "cache": "768m"}
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
	undo = sync.OnceValue(undo)
	defer func() { // a failure half-way must not be the next one's
		assert.NoError(t, undo())
		if t.Failed() {
			w.renew()
		}
	}()
	require.NoError(t, err)
	began := time.Now()
	results := make(chan error, 2)
	go func() { results <- s.k.up(updated) }()
	tried := newKubelet(w.Node, "tried", w.volume)
	go func() { results <- errors.Join(tried.up(updated), tried.down()) }()
	if m.lasts > 0 {
		time.Sleep(m.lasts) // the misfortune itself
		require.NoError(t, undo())
	}
	failures := errors.Join(<-results, <-results)
	t.Logf("what was tried took %s: %v", time.Since(began).Round(time.Millisecond), failures)
	require.NoError(t, undo())
	if !m.ends { // then it is another pod that is tried
		says(t, s.k, m.pod)
	}
	says(t, tried, m.others)
	assert.True(t, !m.must || failures != nil, "nothing has failed")
	if m.kills {
		died, err := w.heal(time.Second)
		require.NoError(t, err)
		t.Logf("containerd has ended: %v", died)
	}

	// Those who try again succeed, and all is as before.
	for _, k := range []*kubelet{s.k, other} {
		require.NoError(t, testnode.Eventually(limited(t), func(context.Context) error {
			if err := k.up(execDone); err != nil {
				return err
			}
			return w.reachesHost(k)
		}))
	}
	assert.Equal(t, otherBefore, other.pod, "the other pod lives on")
	assert.Equal(t, m.ends, before != s.k.pod, "the pod has ended")
	for _, k := range []*kubelet{s.k, tried, other} {
		require.NoError(t, testnode.Eventually(limited(t), func(context.Context) error { return k.down() }))
	}
	assert.NoError(t, w.clean())
}

// reachesHost fails unless the container has an answer from the host over the pod's network.
func (w *world) reachesHost(k *kubelet) error {
	ctx, cancel := limit(callLimit)
	defer cancel()
	out, errOut, code, err := w.ExecSync(ctx, k.container, "ping", "-c", "1", "-W", "5", w.HostIPs()[0].String())
	if err == nil && code != 0 {
		err = fmt.Errorf("the host does not answer: %s%s: %w", out, errOut, errdefs.ErrUnavailable)
	}
	return err
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
	return s, nil
}

func vmmOf(s *struck) int        { return s.vmm }
func shimOf(s *struck) int       { return s.shim }
func containerdOf(s *struck) int { return s.Pid() }

func nothingToUndo() error { return nil }

// freeze stops a process.
func freeze(who func(*struck) int) func(*struck) (func() error, error) {
	return func(s *struck) (func() error, error) {
		pid := who(s)
		return func() error { return unix.Kill(pid, unix.SIGCONT) }, unix.Kill(pid, unix.SIGSTOP)
	}
}

// noFiles lets a process open no further file.
func noFiles(who func(*struck) int) func(*struck) (func() error, error) {
	return func(s *struck) (func() error, error) {
		pid := who(s)
		var before unix.Rlimit
		if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &before); err != nil {
			return nothingToUndo, err
		}
		before.Max = min(before.Max, 1<<20) // which is what the kernel would let it be
		// The limit is one of numbers: no number below it may be free.
		limited := before
		for limited.Cur = 0; ; limited.Cur++ {
			if _, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, limited.Cur)); err != nil {
				break
			}
		}
		return func() error { return unix.Prlimit(pid, unix.RLIMIT_NOFILE, &before, nil) }, unix.Prlimit(pid, unix.RLIMIT_NOFILE, &limited, nil)
	}
}

// noResource says why a process of another user cannot be limited.
func noResource() string {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return err.Error()
	}
	if data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) == 0 {
		return "a VMM's limits cannot be set without CAP_SYS_RESOURCE, as it is another user's"
	}
	return ""
}

// plugging has the pod get another container with a disk meanwhile.
func plugging(befall func(*struck) (func() error, error)) func(*struck) (func() error, error) {
	return func(s *struck) (func() error, error) {
		s.k.names, s.k.disk = []string{"c", "d"}, s.disk
		return befall(s)
	}
}

// noProcesses puts containerd into a cgroup that has no room for another task.
func noProcesses(s *struck) (func() error, error) {
	group, root, err := testnode.CgroupOf(s.Pid(), "pids")
	if err != nil {
		return nothingToUndo, err
	}
	before, dir := filepath.Join(root, group), filepath.Join(root, "chv-full")
	if err := os.Mkdir(dir, 0o755); err != nil { //nolint:gosec // a cgroup is everybody's to read
		return nothingToUndo, err
	}
	write := func(dir, file, text string) error { return os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644) }
	undo := func() error {
		ctx, cancel := limit(10 * time.Second)
		defer cancel()
		return testnode.Eventually(ctx, func(context.Context) error {
			pids, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			for pid := range strings.FieldsSeq(string(pids)) {
				err = errors.Join(err, write(before, "cgroup.procs", pid))
			}
			return errors.Join(err, os.Remove(dir))
		})
	}
	if err := write(dir, "cgroup.procs", strconv.Itoa(s.Pid())); err != nil {
		return undo, err
	}
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", s.Pid()))
	return undo, errors.Join(err, write(dir, "pids.max", strconv.Itoa(len(threads))))
}

// outOfMemory lets the pod's cgroup have little more memory than it has, and the guest take
// more.
func outOfMemory(s *struck) (func() error, error) {
	ctx, cancel := limit(callLimit)
	defer cancel()
	var dir string
	err := testnode.Eventually(ctx, func(context.Context) error { // it moves there beside the start
		group, root, err := testnode.CgroupOf(s.vmm, "memory")
		if err == nil && !strings.Contains(group, s.k.pod) {
			err = fmt.Errorf("the VMM is in %s, which is not the pod's: %w", group, errdefs.ErrUnavailable)
		}
		dir = filepath.Join(root, group)
		return err
	})
	if err != nil {
		return nothingToUndo, err
	}
	usage, most := "memory.usage_in_bytes", "memory.limit_in_bytes"
	if _, err := os.Stat(filepath.Join(dir, usage)); err != nil {
		usage, most = "memory.current", "memory.max"
	}
	text, err := os.ReadFile(filepath.Join(dir, usage))
	if err != nil {
		return nothingToUndo, err
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return nothingToUndo, err
	}
	before, err := os.ReadFile(filepath.Join(dir, most))
	if err != nil {
		return nothingToUndo, err
	}
	set := func(text string) error { return os.WriteFile(filepath.Join(dir, most), []byte(text), 0o644) }
	undo := func() error {
		if err := set(string(before)); !errors.Is(err, fs.ErrNotExist) { // it goes with the pod
			return err
		}
		return nil
	}
	if err := set(strconv.FormatInt(n+2<<20, 10)); err != nil {
		return undo, err
	}
	// It ends with the machine.
	_, _, _, _ = s.ExecSync(ctx, s.k.container, "/bin/sh", "-c", "head -c 25000000 /dev/zero | tail >/dev/null")
	return undo, testnode.Eventually(ctx, func(context.Context) error {
		if unix.Kill(s.vmm, 0) == nil {
			return fmt.Errorf("the VMM lives, and has its memory: %w", errdefs.ErrFailedPrecondition)
		}
		return nil
	})
}

// nameless removes the name of the pod's network namespace, as `ip netns delete` does.
func nameless(s *struck) (func() error, error) {
	return nothingToUndo, errors.Join(unix.Unmount(s.netns, unix.MNT_DETACH), os.Remove(s.netns))
}

// noBridge removes the bridge of all pods. Who has removed it makes it again: a CNI plugin
// makes one without addresses, and without the ports that it had.
func noBridge(s *struck) (func() error, error) {
	link, err := netlink.LinkByName(s.Bridge())
	if err != nil {
		return nothingToUndo, err
	}
	return s.MakeBridgeAgain, netlink.LinkDel(link)
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
		f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return nothingToUndo, err
		}
		defer f.Close()
		block := make([]byte, 1<<20)
		for err == nil {
			_, err = f.Write(block)
		}
		if errors.Is(err, unix.ENOSPC) {
			err = nil
		}
		return func() error { return os.Remove(file) }, err
	}
}
