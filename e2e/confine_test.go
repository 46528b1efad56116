// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// The users that VMMs run as by default.
const firstUID, lastUID = 1879048192, 1879048192 + 65535

// requireConfined reads what the kernel tells of a VMM, and returns its user.
func requireConfined(t *testing.T, pid int) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	require.NoError(t, err)
	status := string(text)
	ids := strings.Fields(field(status, "Uid:"))
	require.Len(t, ids, 4)
	require.Equal(t, ids, strings.Fields(field(status, "Gid:")))
	for _, id := range ids {
		require.Equal(t, ids[0], id, "it can become no other user")
	}
	uid, err := strconv.Atoi(ids[0])
	require.NoError(t, err)
	require.GreaterOrEqual(t, uid, firstUID)
	require.LessOrEqual(t, uid, lastUID)
	require.NotContains(t, strings.Fields(field(status, "Groups:")), "0")
	for _, set := range []string{"CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"} {
		require.Equal(t, strings.Repeat("0", 16), field(status, set), set)
	}
	require.Equal(t, "1", field(status, "NoNewPrivs:"))
	requireFilters(t, pid)
	return uid
}

// requireFilters checks that each thread of a VMM has our filter, and some the VMM's own
// besides.
func requireFilters(t *testing.T, pid int) {
	t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	require.NoError(t, err)
	most := 0
	for _, path := range threads {
		text, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		require.NoError(t, err)
		require.Equal(t, "2", field(string(text), "Seccomp:"), "it has a filter")
		filters, err := strconv.Atoi(field(string(text), "Seccomp_filters:"))
		require.NoError(t, err)
		most = max(most, filters)
	}
	require.GreaterOrEqual(t, most, 2, "ours and the VMM's own")
}

// limitControllers are those of which a VMM has limits.
var limitControllers = []string{"memory", "cpu", "pids"}

// inGroup fails unless a process is in a cgroup, in all hierarchies that matter.
func inGroup(pid int, want string) error {
	for _, c := range limitControllers {
		got, _, err := testnode.CgroupOf(pid, c)
		if err != nil {
			return err
		}
		if got != want {
			return fmt.Errorf("process %d is in %s of %s, not in %s", pid, got, c, want)
		}
	}
	return nil
}

// groupFile reads a file of a cgroup, by its name in v2 and its path in v1.
func groupFile(t *testing.T, group, v2, v1 string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("/sys/fs/cgroup", group, v2))
	if errors.Is(err, fs.ErrNotExist) {
		controller, name := path.Split(v1)
		text, err = os.ReadFile(filepath.Join("/sys/fs/cgroup", controller, group, name))
	}
	require.NoError(t, err)
	return strings.TrimSpace(string(text))
}

// group is where the pod's VMM is to be.
func (p *pod) group() string { return p.cfg.GetLinux().GetCgroupParent() + "/cloudhv-" + p.id }

// awaitGroups waits until the pod's processes are in its cgroup.
func (p *pod) awaitGroups(group string) {
	p.t.Helper()
	i := p.info()
	require.NoError(p.t, testnode.Eventually(testContext(p.t), func(context.Context) error {
		return errors.Join(inGroup(i.VMMPid, group), inGroup(i.ShimPid, group+"-shim"))
	}))
}

// requireLimits reads the limits of the pod's VMM. What a VMM may have beyond its
// guest's memory docs/security.md tells.
func (p *pod) requireLimits() {
	p.t.Helper()
	i := p.info()
	limit, err := strconv.ParseInt(groupFile(p.t, p.group(), "memory.max", "memory/memory.limit_in_bytes"), 10, 64)
	require.NoError(p.t, err)
	require.GreaterOrEqual(p.t, limit, i.MemoryBytes+128*mib)
	require.LessOrEqual(p.t, limit, i.MemoryBytes+i.MemoryBytes/64+640*mib)
	quota, _, _ := strings.Cut(groupFile(p.t, p.group(), "cpu.max", "cpu/cpu.cfs_quota_us"), " ")
	require.Equal(p.t, strconv.Itoa((i.VCPUs+1)*100000), quota)
	most, err := strconv.Atoi(groupFile(p.t, p.group(), "pids.max", "pids/pids.max"))
	require.NoError(p.t, err)
	require.Less(p.t, most, 400)
}

// TestConfined reads how the VMM of a pod is confined: of one that was restored for its
// pod, and of one that was ready. It is nobody's company, and stays so when containerd
// starts again.
func TestConfined(t *testing.T) {
	requireCloudHV(t)
	n := poolNode(t, map[string]any{"min": 1, "max": 2})
	img, err := testimage.Helper(suite.helper)
	require.NoError(t, err)
	require.NoError(t, n.Import(testContext(t), testimage.HelperRef, img))
	users := map[int]string{}
	check := func(p *pod) {
		t.Helper()
		p.awaitGroups(p.group())
		uid := requireConfined(t, p.info().VMMPid)
		require.NotContains(t, users, uid)
		users[uid] = p.id
		t.Logf("%s: its group is charged %s bytes", p.info().Outcome, groupFile(t, p.group(), "memory.current", "memory/memory.usage_in_bytes"))
		p.requireLimits()
	}
	first, hit := podOn(t, n), awaitOutcome(t, n, "hit")
	check(first)
	check(hit)
	c := hit.idle("c")
	grown := &container{pod: hit, id: c.id}
	require.NoError(t, hit.resize(1024*mib, 100000))
	grown.requireSize(1, 1088*mib)
	hit.requireLimits()

	require.NoError(t, n.Kill(testContext(t)))
	require.NoError(t, n.Start(testContext(t)))
	next := podOn(t, n)
	check(next)
	hit.awaitGroups(hit.group())
	hit.requireLimits()
	c.exec("true")
}

// TestFilesOfVMs looks at who could open what VMs have on the host's disk.
func TestFilesOfVMs(t *testing.T) {
	requireCloudHV(t)
	p := newPod(t, testnode.CloudHV)
	uid := requireConfined(t, p.info().VMMPid)
	cwd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", p.info().VMMPid))
	require.NoError(t, err)
	dir := filepath.Dir(p.info().VMMLog)
	require.Contains(t, []string{dir, filepath.Join(dir, "own")}, cwd, "it works in a directory of its own")
	for _, dir := range []string{p.n.StateDir(), p.n.CacheDir()} {
		require.NoError(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			info, err := d.Info()
			if err != nil || d.Type()&fs.ModeSymlink != 0 {
				return err
			}
			if d.IsDir() {
				assert.Zero(t, info.Mode().Perm()&0o026, "%s: others may list it or write to it: %v", path, info.Mode())
			} else {
				assert.Zero(t, info.Mode().Perm()&0o022, "%s: others may write to it: %v", path, info.Mode())
			}
			return nil
		}))
	}
	require.NotZero(t, uid)
}

// TestPodCgroup moves processes to where a pod's cgroup is said to be by the name of a
// systemd slice, and leaves nothing there.
func TestPodCgroup(t *testing.T) {
	requireCloudHV(t)
	root := "chvt" + strconv.Itoa(os.Getpid())
	slice := "/" + root + ".slice/" + root + "-pod1.slice"
	t.Cleanup(func() {
		for _, dir := range []string{slice, path.Dir(slice)} {
			for _, c := range append(slices.Clone(limitControllers), "cpuacct", "") {
				err := os.Remove(filepath.Join("/sys/fs/cgroup", c, dir))
				require.True(t, err == nil || errors.Is(err, fs.ErrNotExist), "%v", err)
			}
		}
	})
	cfg := podConfig(t, func(cfg *runtimeapi.PodSandboxConfig) { cfg.Linux.CgroupParent = root + "-pod1.slice" })
	n := node(t)
	id, err := n.RunPod(testContext(t), cfg, testnode.CloudHV)
	require.NoError(t, err)
	p := &pod{t: t, n: n, handler: testnode.CloudHV, id: id, cfg: cfg}
	removed := false
	defer func() {
		if !removed {
			p.remove()
		}
	}()
	group := slice + "/cloudhv-" + id
	p.awaitGroups(group)
	shim := p.info().ShimPid
	st, err := n.Runtime().PodSandboxStats(testContext(t), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: id})
	require.NoError(t, err)
	require.NotZero(t, st.GetStats().GetLinux().GetCpu().GetUsageCoreNanoSeconds().GetValue())
	require.NotZero(t, st.GetStats().GetLinux().GetMemory().GetWorkingSetBytes().GetValue())

	require.NoError(t, n.StopPod(testContext(t), id))
	for _, leaf := range []string{group, group + "-shim"} {
		for _, c := range append(slices.Clone(limitControllers), "") {
			require.NoDirExists(t, filepath.Join("/sys/fs/cgroup", c, leaf))
		}
	}
	require.NoError(t, inGroup(shim, n.CgroupParent()+"/ended/"+id), "the shim goes on elsewhere")
	require.NoError(t, n.RemovePod(testContext(t), id))
	removed = true
}

// TestOOMIsTheGuests has containers without limits want more memory than their VM has,
// whose kernel kills one; the VMM, which has all of it then, is within its limits.
func TestOOMIsTheGuests(t *testing.T) {
	requireCloudHV(t)
	p := newPod(t, testnode.CloudHV)
	p.awaitGroups(p.group())
	before := p.info()
	total, _ := p.idle("before").machine()
	// Each asks for what there is, and both for more.
	hold := func(name string) *container {
		cfg := helperConfig(name, "hold", strconv.FormatInt(total*6/10, 10))
		cfg.Stdin = true
		return p.start(cfg)
	}
	one := hold("one")
	one.awaitLine("ok")
	two := hold("two")
	require.NoError(t, testnode.Eventually(testContext(t), func(context.Context) error {
		for _, c := range []*container{one, two} {
			if st := c.status(); st.GetState() == runtimeapi.ContainerState_CONTAINER_EXITED {
				require.Equal(t, int32(137), st.GetExitCode())
				return nil
			}
		}
		return errors.New("both containers live")
	}))
	p.idle("after").exec("true")
	require.Equal(t, before.VMMPid, p.info().VMMPid)
	var kills string
	for line := range strings.Lines(groupFile(t, p.group(), "memory.events", "memory/memory.oom_control")) {
		if rest, ok := strings.CutPrefix(line, "oom_kill "); ok {
			kills = strings.TrimSpace(rest)
		}
	}
	require.Equal(t, "0", kills)
	t.Logf("the VMM's group has had %s of %s at most",
		groupFile(t, p.group(), "memory.peak", "memory/memory.max_usage_in_bytes"), groupFile(t, p.group(), "memory.max", "memory/memory.limit_in_bytes"))
}
