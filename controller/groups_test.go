// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/controller/config"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// Only what a sandbox of that name can have written is taken from a directory whose
// record cannot be read.
func TestLinkedGroup(t *testing.T) {
	t.Parallel()
	for group, want := range map[string]string{
		"/pods/a/cloudhv-pod1": "/pods/a/cloudhv-pod1", "/cloudhv-pod1": "/cloudhv-pod1",
		"/pods/a/cloudhv-pod2": "", "/pods/a": "", "/": "", "/pods/../cloudhv-pod1": "", "/a/cloudhv-pod1/": "",
	} {
		dir := filepath.Join(t.TempDir(), "pod1")
		require.NoError(t, os.Mkdir(dir, 0o700))
		require.Empty(t, linkedGroup(dir))
		require.NoError(t, os.Symlink(group, filepath.Join(dir, groupLink)))
		require.Equal(t, want, linkedGroup(dir), group)
	}
}

// ownGroup is a cgroup of the test's own, which is removed with what is in it.
func ownGroup(t *testing.T) string {
	t.Helper()
	parent := "/cloudhv-unit-" + strconv.Itoa(os.Getpid())
	if err := vmm.OpenCgroup(parent + "/inner").Make(); err != nil {
		t.Skipf("no cgroups: %v", err)
	}
	t.Cleanup(func() {
		for _, g := range []string{"/inner/ended", "/inner", ""} {
			require.NoError(t, vmm.OpenCgroup(parent+g).TryRemove())
		}
	})
	return parent + "/inner"
}

// requireShimLimits reads the limits of a shim's group, where the host's cgroups have any.
func requireShimLimits(t *testing.T, group string) {
	t.Helper()
	found := 0
	for file, want := range map[string]string{
		"memory.max": "536870912", "memory/memory.limit_in_bytes": "536870912", "pids.max": "512", "pids/pids.max": "512",
		"cpu.max": "200000 100000", "cpu/cpu.cfs_quota_us": "200000",
	} {
		dir, name := filepath.Split(file)
		text, err := os.ReadFile(filepath.Join("/sys/fs/cgroup", dir, group, name))
		if err != nil {
			continue
		}
		found++
		require.Equal(t, want, strings.TrimSpace(string(text)), file)
	}
	if found == 0 {
		t.Log("the host's cgroups have no limits to be read")
	}
}

// What shims that were killed leave is removed, and nobody else's.
func TestSweepGroups(t *testing.T) {
	parent := ownGroup(t)
	c := &Controller{cfg: &config.Settings{Cgroup: true, CgroupParent: parent}, pods: map[string]*pod{"known": {}}}
	sleeper := exec.Command("sleep", "1000")
	require.NoError(t, sleeper.Start())
	for _, id := range []string{"known", "gone", "lives"} {
		require.NoError(t, vmm.OpenCgroup(c.restGroup(id)).Make())
	}
	require.NoError(t, putInto(c.restGroup("lives"), sleeper.Process.Pid))
	requireShimLimits(t, c.restGroup("lives"))
	c.sweepGroups(t.Context())
	require.ElementsMatch(t, []string{"known", "lives"}, vmm.OpenCgroup(c.restGroup("")).Children())
	require.NoError(t, c.removeShimGroups(t.Context(), "lives", "/unused/cloudhv-lives"), "what is left is killed")
	require.Error(t, sleeper.Wait())
	require.NoError(t, vmm.OpenCgroup(c.restGroup("known")).Remove(t.Context()))
}
