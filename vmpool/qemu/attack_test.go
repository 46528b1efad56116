// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package qemu

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/vmpool/confine"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// testUID and the one after it are the users of VMMs in these tests.
const testUID = 1879048192 + 4242

// takenOver is a VMM whose program is this test's: what the driver started is at the
// mercy of its guest.
type takenOver struct {
	*machine
	cfg vmm.Config
}

// takeOver starts one as the driver starts QEMU, with everything of a restored VM.
func takeOver(t *testing.T, uid uint32, group string) *takenOver {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("VMMs are confined by root")
	}
	if !confine.HasLandlock() {
		t.Skip("the kernel has no Landlock")
	}
	base := t.TempDir()
	for dir := base; dir != "/"; dir = filepath.Dir(dir) {
		if info, err := os.Stat(dir); err == nil && info.Mode().Perm()&0o001 == 0 {
			require.NoError(t, os.Chmod(dir, info.Mode().Perm()|0o011)) // go test makes it for its own user
		}
	}
	// As nodes have it: directories that lead somewhere, and files for nobody.
	dirs := map[string]string{}
	for _, name := range []string{"vm", "pool", "template"} {
		dirs[name] = filepath.Join(base, name)
		require.NoError(t, os.Mkdir(dirs[name], 0o711))
	}
	// The path of a test's directory is too long for sockets.
	dir, err := os.MkdirTemp("", "vm")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	for _, path := range []string{
		filepath.Join(dir, "vm.json"), filepath.Join(dirs["pool"], "scratch"), filepath.Join(dirs["pool"], "rootfs"), memoryPath(dirs["template"]),
	} {
		require.NoError(t, os.WriteFile(path, make([]byte, 64<<10), 0o600))
	}
	program := filepath.Join(base, "qemu")
	self, err := os.ReadFile("/proc/self/exe")
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(program, self, 0o755))
	require.NoError(t, os.Chmod(program, 0o755|os.ModeSetuid))
	cfg := vmm.Config{
		ID: filepath.Base(dir), Dir: dir, Kernel: program, RootFS: filepath.Join(dirs["pool"], "rootfs"), Scratch: filepath.Join(dirs["pool"], "scratch"),
		Size: vmm.Size{VCPUs: 1, MemoryBytes: 64 << 20}, Max: vmm.Size{VCPUs: 1, MemoryBytes: 64 << 20}, ConsoleLimit: 64 << 10,
		UID: uid, CgroupPath: group,
	}
	own := data{Size: cfg.Size, Max: cfg.Max, ConsoleLimit: cfg.ConsoleLimit, Accelerator: vmm.AccelTCG}
	vm, err := newVM(cfg.ID, dir, group, uid, own)
	require.NoError(t, err)
	require.NoError(t, vm.MakeCgroup())
	v := &takenOver{machine: vm, cfg: cfg}
	seal, err := vm.spawn(t.Context(), vmm.Host{Binary: program, Accelerator: vmm.AccelTCG}, cfg, &vmm.Snapshot{Dir: dirs["template"]})
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, vm.Kill(testContext(t)))
		require.NoError(t, vm.Close())
	})
	v.try(t, &targets{}) // it listens now, as QEMU does when its monitor answers
	seal()
	return v
}

// try has it do something, and returns what it tells; nil if it ended.
func (v *takenOver) try(t *testing.T, what *targets) map[string]string {
	t.Helper()
	conn, err := net.Dial("unix", filepath.Join(v.cfg.Dir, monitorSocket))
	require.NoError(t, err)
	defer conn.Close() //nolint:errcheck
	require.NoError(t, conn.SetDeadline(time.Now().Add(limit)))
	require.NoError(t, json.NewEncoder(conn).Encode(what))
	var results map[string]string
	if err := json.NewDecoder(conn).Decode(&results); err != nil {
		t.Logf("%v: %s", err, vmm.Tail(filepath.Join(v.cfg.Dir, vmm.VMMLog), 4<<10))
		return nil
	}
	return results
}

// lure makes what an attacker goes for. Some of it any user of the host may use.
func lure(t *testing.T, v, neighbour *takenOver, address string) *targets {
	t.Helper()
	dir, err := os.MkdirTemp("", "lax")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o777))
	what := &targets{
		Parent: os.Getpid(), Other: neighbour.Pid(), OwnDir: v.cfg.Dir, OtherDir: neighbour.cfg.Dir, OtherDisk: neighbour.cfg.Scratch,
		Record: filepath.Join(v.cfg.Dir, "vm.json"), Image: v.cfg.RootFS,
		LaxFile: filepath.Join(dir, "file"), LaxSocket: filepath.Join(dir, "socket"), LaxDgram: filepath.Join(dir, "dgram"),
		Abstract: "@cloudhv-test-" + strconv.Itoa(os.Getpid()) + v.cfg.ID, SetUID: filepath.Join(dir, "setuid"),
	}
	for fd := range 64 {
		if path, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", v.Pid(), fd)); err == nil && strings.HasSuffix(path, "/"+memoryName) {
			what.Memory = path
		}
	}
	what.EchoedAddress, err = strconv.ParseUint(address, 10, 64)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(what.LaxFile, make([]byte, 10), 0o600))
	self, err := os.ReadFile(v.cfg.Kernel)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(what.SetUID, self, 0o755))
	require.NoError(t, os.Chmod(what.SetUID, 0o755|os.ModeSetuid))
	for _, path := range []string{what.LaxSocket, what.Abstract} {
		l, err := net.Listen("unix", path)
		require.NoError(t, err)
		t.Cleanup(func() { _ = l.Close() })
	}
	dgram, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: what.LaxDgram, Net: "unixgram"})
	require.NoError(t, err)
	t.Cleanup(func() { _ = dgram.Close() })
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = tcp.Close() })
	what.TCP = tcp.Addr().String()
	for _, path := range []string{what.LaxFile, what.LaxSocket, what.LaxDgram} {
		require.NoError(t, os.Chmod(path, 0o666))
	}
	return what
}

// TestTakenOver has a VMM do what it must not be able to. An unconfined one does the
// same, and can: so the attempts are ones.
func TestTakenOver(t *testing.T) {
	neighbour := takeOver(t, testUID+1, "")
	address := neighbour.try(t, &targets{})["address"]

	t.Run("confined", func(t *testing.T) {
		v := takeOver(t, testUID, "")
		results := v.try(t, lure(t, v, neighbour, address))
		require.NotNil(t, results)
		for _, a := range slices.Concat(fileAttacks, processAttacks) {
			why, tried := results[a.name]
			assert.True(t, tried, a.name)
			assert.NotEmpty(t, why, "a VMM can %s", a.name)
			t.Logf("%s: %s", a.name, why)
		}
	})
	t.Run("not confined", func(t *testing.T) {
		v := takeOver(t, 0, "")
		results := v.try(t, lure(t, v, neighbour, address))
		require.NotNil(t, results)
		for _, a := range slices.Concat(fileAttacks, processAttacks) {
			if !a.alone {
				assert.Empty(t, results[a.name], "%s fails without confinement too, so it proves nothing", a.name)
			}
		}
	})
}

// testGroup is a cgroup of this test's, or it is skipped.
func testGroup(t *testing.T) string {
	t.Helper()
	parent := "/cloudhv-test-" + strconv.Itoa(os.Getpid())
	group := vmm.OpenCgroup(parent)
	if err := group.Make(); err != nil {
		t.Skipf("no cgroups: %v", err)
	}
	t.Cleanup(func() { require.NoError(t, group.Remove(testContext(t))) })
	return parent + "/vmm"
}

// TestTakenOverMultiplies has a VMM start processes without end, which end with it.
func TestTakenOverMultiplies(t *testing.T) {
	group := testGroup(t)
	v := takeOver(t, testUID, group)
	const most = 1000
	results := v.try(t, &targets{Processes: most})
	require.NotNil(t, results)
	count, err := strconv.Atoi(results["processes"])
	require.NoError(t, err)
	t.Logf("%d processes", count)
	require.Less(t, count, vmm.MaxVCPUs+maxThreads)
	require.Positive(t, count)
	require.NoError(t, v.Kill(testContext(t)))
	require.False(t, vmm.OpenCgroup(group).Exists(), "its processes are gone")
}

// TestTakenOverTakesMemory has a VMM use more than its guest's size and the overhead.
func TestTakenOverTakesMemory(t *testing.T) {
	group := testGroup(t)
	v := takeOver(t, testUID, group)
	bound := vmm.LimitsFor(v.own.Size, overheadOf(v.own.Accelerator), maxThreads).MemoryBytes
	require.Nil(t, v.try(t, &targets{MemoryBytes: int(bound + 64<<20)}), "it got more than its limit")
	<-v.Done()
	require.Contains(t, v.Exit().Cause, "killed by signal 9")
	require.False(t, v.Exit().Requested)

	within := takeOver(t, testUID, group)
	require.NotNil(t, within.try(t, &targets{MemoryBytes: int(within.own.Size.MemoryBytes)}), "its guest's memory it has")
}
