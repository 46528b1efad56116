// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package task

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/machine"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/reap"
	"github.com/cloudhv/containerd-cloudhv/guest/api"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

func TestValidID(t *testing.T) {
	t.Parallel()
	for id, want := range map[string]bool{
		"a": true, "0123abc": true, "a.b_c-d": true, strings.Repeat("a", api.MaxIDBytes): true,
		"": false, ".": false, "..": false, "-a": false, "_a": false, "a/b": false, "a b": false, "ä": false, "a\x00": false,
		strings.Repeat("a", api.MaxIDBytes+1): false,
	} {
		require.Equal(t, want, ValidID(id), "%q", id)
	}
}

func TestAdapt(t *testing.T) {
	t.Parallel()
	volume := bind(api.VolumeRoot+"/1", "/data", false)
	s := &specs.Spec{
		Hostname: "x", Annotations: map[string]string{"run.oci.handler": "wasm", "a": "b"},
		Root:    &specs.Root{Path: "/host/path", Readonly: true},
		Process: &specs.Process{Args: []string{"a"}, Terminal: true},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc"},
			{Destination: "/dev/shm", Type: "tmpfs"},
			volume,
			{Destination: "/data/sub", Type: "tmpfs"},
			{Destination: "/etc/hostname/", Type: "bind", Source: "/own"},
		},
		Linux: &specs.Linux{CgroupsPath: "/kubepods/x", Namespaces: []specs.LinuxNamespace{
			{Type: specs.PIDNamespace}, {Type: specs.NetworkNamespace, Path: "/var/run/netns/x"}, {Type: specs.IPCNamespace},
			{Type: specs.UTSNamespace}, {Type: specs.MountNamespace}, {Type: specs.UserNamespace, Path: "/proc/1/ns/user"},
		}},
	}
	adapt(s, guest{root: "/r", cgroup: "/pod/c", pidns: "/proc/9/ns/pid", pod: machine.Pod{Dir: "/pod"}})
	want := &specs.Spec{
		Annotations: map[string]string{"a": "b"},
		Root:        &specs.Root{Path: "/r", Readonly: true},
		Process:     &specs.Process{Args: []string{"a"}},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc"},
			volume,
			{Destination: "/data/sub", Type: "tmpfs"},
			{Destination: "/etc/hostname/", Type: "bind", Source: "/own"},
			bind("/pod/hosts", "/etc/hosts", true),
			bind("/pod/resolv.conf", "/etc/resolv.conf", true),
			{Destination: "/dev/shm", Type: "bind", Source: "/pod/shm", Options: []string{"rbind", "rprivate", "nosuid", "nodev", "noexec", "rw"}},
		},
		Linux: &specs.Linux{CgroupsPath: "/pod/c", Namespaces: []specs.LinuxNamespace{
			{Type: specs.PIDNamespace, Path: "/proc/9/ns/pid"}, {Type: specs.MountNamespace}, {Type: specs.CgroupNamespace},
		}},
	}
	require.Empty(t, cmp.Diff(want, s))
}

func TestPrivateShm(t *testing.T) {
	t.Parallel()
	own := specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Options: []string{"size=1m"}}
	got := mounts([]specs.Mount{own}, guest{privateShm: true, pod: machine.Pod{Dir: "/pod"}}, false)
	require.Equal(t, own, got[0])
	require.Len(t, got, 4)
}

func TestCheckSpec(t *testing.T) {
	t.Parallel()
	ok := func() *specs.Spec {
		return &specs.Spec{Process: &specs.Process{Args: []string{"a"}}, Linux: &specs.Linux{}}
	}
	require.NoError(t, checkSpec(ok()))
	for name, change := range map[string]func(*specs.Spec){
		"process":   func(s *specs.Spec) { s.Process = nil },
		"arguments": func(s *specs.Spec) { s.Process.Args = nil },
		"linux":     func(s *specs.Spec) { s.Linux = nil },
		"hooks":     func(s *specs.Spec) { s.Hooks = &specs.Hooks{Poststop: []specs.Hook{{Path: "/x"}}} },
	} {
		s := ok()
		change(s)
		err := checkSpec(s)
		require.True(t, errdefs.IsInvalidArgument(err), "%s: %v", name, err)
		require.ErrorContains(t, err, name)
	}
}

func FuzzCheckCreate(f *testing.F) {
	f.Add("a", []byte(`{"process":{"args":["a"]},"linux":{"namespaces":[{"type":"pid"}]},"mounts":[{"destination":"/x"}]}`))
	f.Fuzz(func(_ *testing.T, id string, spec []byte) {
		r := &guestv1.CreateRequest{Id: id, Spec: spec}
		s, err := checkCreate(r)
		if err != nil {
			return
		}
		adapt(s, guest{root: "/r", cgroup: "/c"})
		_, _ = json.Marshal(s)
	})
}

func FuzzDecodeProcess(f *testing.F) {
	f.Add([]byte(`{"args":["a"],"oomScoreAdj":1}`))
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = decodeProcess(b) })
}

// TestTransitions goes through every pair of states.
func TestTransitions(t *testing.T) {
	t.Parallel()
	all := []state{stateNew, stateCreated, stateStarting, stateRunning, stateStopped}
	allowed := map[[2]state]bool{
		{stateNew, stateCreated}:      true,
		{stateCreated, stateStarting}: true, {stateCreated, stateRunning}: true, {stateCreated, stateStopped}: true,
		{stateStarting, stateRunning}: true, {stateStarting, stateStopped}: true,
		{stateRunning, stateStopped}: true,
	}
	for _, from := range all {
		for _, to := range all {
			p := newProcess("x")
			p.st = from
			err := p.to(to)
			if allowed[[2]state{from, to}] {
				require.NoError(t, err, "%s to %s", from, to)
				require.Equal(t, to, p.state())
				continue
			}
			require.True(t, errdefs.IsFailedPrecondition(err), "%s to %s: %v", from, to, err)
			require.Equal(t, from, p.state())
			p.deleted = true
			require.Error(t, p.to(to))
		}
	}
}

func TestProcess(t *testing.T) {
	t.Parallel()
	p := newProcess("")
	require.True(t, errdefs.IsFailedPrecondition(p.signal(unix.SIGTERM)))
	p.born(1<<30, stateCreated) // no such pid
	require.Equal(t, 1<<30, p.alive())
	require.True(t, errdefs.IsNotFound(p.signal(unix.SIGTERM)))
	p.lost()
	require.Zero(t, p.alive())
	at := time.Unix(100, 0)
	p.stopped(reap.Exit{Status: 3, At: at}, 2)
	p.stopped(reap.Exit{Status: 4}, 0) // only the first counts
	<-p.done
	snap := p.snapshot()
	require.Equal(t, 3, snap.exit.Status)
	require.EqualValues(t, 2, snap.oomKills)
	require.True(t, errdefs.IsNotFound(p.signal(unix.SIGTERM)))
	p.remove()
	p.remove()

	p = newProcess("never started")
	require.NoError(t, p.to(stateCreated))
	require.NoError(t, p.removeUnlessActive())
	<-p.done
	require.Equal(t, stateCreated, p.snapshot().st)
	p = newProcess("running")
	p.born(0, stateCreated)
	require.NoError(t, p.to(stateRunning))
	require.True(t, errdefs.IsFailedPrecondition(p.removeUnlessActive()))
}

func TestStatus(t *testing.T) {
	t.Parallel()
	require.Equal(t, guestv1.Status_STATUS_RUNNING, status(stateRunning, false))
	require.Equal(t, guestv1.Status_STATUS_PAUSED, status(stateRunning, true))
	require.Equal(t, guestv1.Status_STATUS_STOPPED, status(stateStopped, true))
	require.Equal(t, guestv1.Status_STATUS_CREATED, status(stateStarting, false))
	require.Equal(t, guestv1.Status_STATUS_UNKNOWN, status(stateNew, false))
}

func TestLimits(t *testing.T) {
	t.Parallel()
	s, err := New(Config{Bundles: t.TempDir()})
	require.NoError(t, err)
	for i := range maxContainers {
		_, err := s.reserve("c" + strings.Repeat("x", i%100) + string(rune('a'+i/100)))
		require.NoError(t, err)
	}
	_, err = s.reserve("more")
	require.True(t, errdefs.IsResourceExhausted(err), "%v", err)
	_, err = s.reserve("ca")
	require.True(t, errdefs.IsAlreadyExists(err), "%v", err)
	_, err = s.container("ca") // not created yet
	require.True(t, errdefs.IsNotFound(err), "%v", err)
}
