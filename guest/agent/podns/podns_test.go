// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package podns

import (
	"context"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/reap"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

const firstUser, firstGroup, ids = 131072, 262144, 65536

func userNamespace() *guestv1.UserNamespace {
	return &guestv1.UserNamespace{
		Uids: &guestv1.IDMapping{First: firstUser, Size: ids},
		Gids: &guestv1.IDMapping{First: firstGroup, Size: ids},
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	require.NoError(t, Validate(userNamespace()))
	require.NoError(t, Validate(&guestv1.UserNamespace{
		Uids: &guestv1.IDMapping{First: math.MaxUint32 - 1, Size: 1}, Gids: &guestv1.IDMapping{Size: math.MaxUint32},
	}))
	for name, u := range map[string]*guestv1.UserNamespace{
		"uids": {Gids: &guestv1.IDMapping{Size: 1}},
		"gids": {Uids: &guestv1.IDMapping{Size: 1}, Gids: &guestv1.IDMapping{First: 1, Size: math.MaxUint32}},
	} {
		err := Validate(u)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		require.ErrorContains(t, err, "user_namespace."+name)
	}
}

// TestNamespaces makes them on this machine; the test's own binary is the pause process.
func TestNamespaces(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	reaper, err := reap.Start(ctx)
	require.NoError(t, err)
	n, err := New("/proc/self/exe", reaper, userNamespace())
	require.NoError(t, err)
	t.Cleanup(n.close)
	pid, err := n.PausePid()
	require.NoError(t, err)
	proc := fmt.Sprint("/proc/", pid)
	for file, first := range map[string]int{"uid_map": firstUser, "gid_map": firstGroup} {
		b, err := os.ReadFile(filepath.Join(proc, file))
		require.NoError(t, err)
		require.Equal(t, fmt.Sprint([]string{"0", fmt.Sprint(first), fmt.Sprint(ids)}), fmt.Sprint(strings.Fields(string(b))))
	}
	status, err := os.ReadFile(filepath.Join(proc, "status"))
	require.NoError(t, err)
	require.Contains(t, string(status), fmt.Sprintf("Uid:\t%d\t%[1]d\t%[1]d\t%[1]d\nGid:\t%d\t%[2]d\t%[2]d\t%[2]d\n", firstUser, firstGroup))

	// What containers join are the process's, and others than here.
	for _, ns := range n.Spec() {
		name := map[specs.LinuxNamespaceType]string{specs.UserNamespace: "user", specs.NetworkNamespace: "net", specs.IPCNamespace: "ipc", specs.UTSNamespace: "uts"}[ns.Type]
		require.Equal(t, link(t, filepath.Join(proc, "ns", name)), link(t, ns.Path))
		require.NotEqual(t, link(t, filepath.Join("/proc/self/ns", name)), link(t, ns.Path))
	}

	here := namespacesHere(t)
	var there [3]string
	require.NoError(t, n.Do(func() error { there = namespacesHere(t); return unix.Sethostname([]byte("theirs")) }))
	require.Equal(t, [3]string{link(t, proc+"/ns/net"), link(t, proc+"/ns/ipc"), link(t, proc+"/ns/uts")}, there)
	// As root of the namespace, who has a parameter of its and none of the machine's.
	require.NoError(t, n.DoAsRoot(func() error {
		require.ErrorIs(t, os.WriteFile("/proc/sys/vm/overcommit_memory", []byte("0"), 0), unix.EACCES)
		return os.WriteFile("/proc/sys/kernel/shm_rmid_forced", []byte("1"), 0)
	}))
	// No thread of this process has stayed there, or is somebody else.
	process := link(t, "/proc/self/ns/net")
	for range 100 {
		require.NoError(t, n.DoAsRoot(func() error { return nil }))
		require.Equal(t, here, namespacesHere(t))
		require.Equal(t, process, link(t, "/proc/self/ns/net"))
		require.Equal(t, 0, os.Geteuid())
	}
	require.ErrorIs(t, n.Do(func() error { return unix.ENODEV }), unix.ENODEV)

	require.NoError(t, unix.Kill(pid, unix.SIGKILL))
	require.Eventually(t, func() bool { _, err := n.PausePid(); return errdefs.IsFailedPrecondition(err) }, 10*time.Second, time.Millisecond)
	require.NoError(t, n.Do(func() error {
		var u unix.Utsname
		require.NoError(t, unix.Uname(&u))
		require.Equal(t, "theirs", unix.ByteSliceToString(u.Nodename[:]))
		return nil
	}), "they outlive the process")
}

func link(t *testing.T, path string) string {
	t.Helper()
	to, err := os.Readlink(path)
	require.NoError(t, err)
	return to
}

// namespacesHere are those of this thread.
func namespacesHere(t *testing.T) (all [3]string) {
	t.Helper()
	for i, name := range []string{"net", "ipc", "uts"} {
		all[i] = link(t, "/proc/thread-self/ns/"+name)
	}
	return all
}

func TestCheck(t *testing.T) {
	t.Parallel()
	n := &Namespaces{uids: userNamespace().GetUids(), gids: userNamespace().GetGids()}
	good := func() *specs.Linux {
		return &specs.Linux{UIDMappings: mapping(n.uids), GIDMappings: mapping(n.gids)}
	}
	var none *Namespaces
	require.NoError(t, n.Check(good()))
	require.NoError(t, none.Check(&specs.Linux{}))
	require.Empty(t, none.Spec())
	require.Nil(t, none.File())
	require.ErrorContains(t, none.Check(good()), "linux.uidMappings")
	require.ErrorContains(t, n.Check(&specs.Linux{}), "linux.uidMappings")
	for _, change := range []func(*specs.Linux){
		func(l *specs.Linux) { l.GIDMappings[0].HostID++ },
		func(l *specs.Linux) { l.GIDMappings[0].Size++ },
		func(l *specs.Linux) { l.GIDMappings[0].ContainerID++ },
		func(l *specs.Linux) { l.GIDMappings = append(l.GIDMappings, l.GIDMappings[0]) },
		func(l *specs.Linux) { l.GIDMappings = nil },
	} {
		l := good()
		change(l)
		err := n.Check(l)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		require.ErrorContains(t, err, "linux.gidMappings")
	}
	got, ok := n.Group(ids - 1)
	require.True(t, ok)
	require.EqualValues(t, firstGroup+ids-1, got)
	_, ok = n.Group(ids)
	require.False(t, ok)
	got, ok = n.User(1)
	require.True(t, ok)
	require.EqualValues(t, firstUser+1, got)
}
