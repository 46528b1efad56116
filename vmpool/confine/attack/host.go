// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package attack

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/vmpool/confine"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// This file is the host's side: the test that has a driver start the attacker.

// limit bounds a step of a test.
const limit = 2 * time.Minute

// Context ends with the time of a step, also when the test has ended.
func Context(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), limit)
	t.Cleanup(cancel)
	return ctx
}

// VM is a VM whose VMM is at the mercy of its guest.
type VM struct {
	vmm.VM
	Config vmm.Config
	// Socket is the file name of where it takes orders, in its directory.
	Socket string
}

// pid is the VMM's.
func (v *VM) pid() int { return v.State().Pid }

// recordName is a file of a VM's directory that is no driver's.
const recordName = "vm.json"

// Host is where VMs are on a node: directories that lead somewhere, and files for nobody.
type Host struct {
	// Program is this test's, which is to be started as the hypervisor.
	Program string
	// Template is the directory of a snapshot whose guest's memory is in the file of that
	// name.
	Template string
}

// NewHost makes one, with a program of that name.
func NewHost(t *testing.T, program string) *Host {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("VMMs are confined by root")
	}
	if !confine.HasLandlock() {
		if os.Getenv("E2E_REQUIRE") == "1" {
			t.Fatal("the kernel has no Landlock")
		}
		t.Skip("the kernel has no Landlock")
	}
	base := t.TempDir()
	for dir := base; dir != "/"; dir = filepath.Dir(dir) {
		if info, err := os.Stat(dir); err == nil && info.Mode().Perm()&0o001 == 0 {
			require.NoError(t, os.Chmod(dir, info.Mode().Perm()|0o011)) // go test makes it for its own user
		}
	}
	h := &Host{Program: filepath.Join(base, program), Template: filepath.Join(base, "template")}
	require.NoError(t, os.Mkdir(h.Template, 0o711))
	require.NoError(t, os.WriteFile(filepath.Join(h.Template, "memory"), make([]byte, 64<<10), 0o600))
	copySelf(t, h.Program)
	return h
}

// copySelf copies this program to where each user runs it as root, if root's user is what
// a mode makes of it.
func copySelf(t *testing.T, path string) {
	t.Helper()
	self, err := os.ReadFile("/proc/self/exe")
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(path, self, 0o755))
	require.NoError(t, os.Chmod(path, 0o755|os.ModeSetuid))
}

// Config is a VM's, with files of its own.
func (h *Host) Config(t *testing.T, uid uint32, group string) vmm.Config {
	t.Helper()
	pool := filepath.Join(filepath.Dir(h.Program), "pool-"+strconv.Itoa(int(uid)))
	require.NoError(t, os.MkdirAll(pool, 0o711))
	// The path of a test's directory is too long for sockets.
	dir, err := os.MkdirTemp("", "vm")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	cfg := vmm.Config{
		ID: filepath.Base(dir), Dir: dir, Kernel: h.Program, RootFS: filepath.Join(pool, "rootfs"), Scratch: filepath.Join(pool, filepath.Base(dir)),
		Size: vmm.Size{VCPUs: 1, MemoryBytes: 64 << 20}, Max: vmm.Size{VCPUs: 1, MemoryBytes: 64 << 20}, ConsoleLimit: 64 << 10,
		UID: uid, CgroupPath: group,
	}
	for _, path := range []string{filepath.Join(dir, recordName), cfg.Scratch, cfg.RootFS} {
		require.NoError(t, os.WriteFile(path, make([]byte, 64<<10), 0o600))
	}
	return cfg
}

// Try has the VMM do something, and returns what it tells; nil if it ended.
func (v *VM) Try(t *testing.T, what *Targets) map[string]string {
	t.Helper()
	conn, err := net.Dial("unix", filepath.Join(v.Config.Dir, v.Socket))
	require.NoError(t, err)
	defer conn.Close() //nolint:errcheck // nothing is buffered
	require.NoError(t, conn.SetDeadline(time.Now().Add(limit)))
	require.NoError(t, json.NewEncoder(conn).Encode(what))
	var results map[string]string
	if err := json.NewDecoder(conn).Decode(&results); err != nil {
		t.Logf("%v: %s", err, vmm.Tail(filepath.Join(v.Config.Dir, vmm.VMMLog), 4<<10))
		return nil
	}
	return results
}

// Lure makes what an attacker goes for. Some of it any user of the host may use.
func (v *VM) Lure(t *testing.T, neighbour *VM) *Targets {
	t.Helper()
	dir, err := os.MkdirTemp("", "lax")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o777)) //nolint:gosec // that is the point
	what := &Targets{
		Parent: os.Getpid(), Other: neighbour.pid(),
		OwnDir: v.Config.Dir, OtherDir: neighbour.Config.Dir, Disk: v.Config.Scratch, OtherDisk: neighbour.Config.Scratch,
		OwnSocket: filepath.Join(v.Config.Dir, v.Socket), OtherSocket: filepath.Join(neighbour.Config.Dir, neighbour.Socket),
		Record: filepath.Join(v.Config.Dir, recordName), Image: v.Config.RootFS,
		LaxFile: filepath.Join(dir, "file"), LaxSocket: filepath.Join(dir, "socket"), LaxDgram: filepath.Join(dir, "dgram"),
		Abstract: "@cloudhv-test-" + strconv.Itoa(os.Getpid()) + v.Config.ID, SetUID: filepath.Join(dir, "setuid"),
		Memory: v.fileOf("/memory"), SharedMemory: sharedMemory(t), Files: map[string]string{},
	}
	what.EchoedAddress, err = strconv.ParseUint(neighbour.Try(t, &Targets{})[resultAddress], 10, 64)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(what.LaxFile, make([]byte, 10), 0o600))
	copySelf(t, what.SetUID)
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
		require.NoError(t, os.Chmod(path, 0o666)) //nolint:gosec // that is the point
	}
	return what
}

// fileOf is the path of a file that the VMM has open, known by how that ends.
func (v *VM) fileOf(suffix string) string {
	for fd := range 64 {
		if path, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", v.pid(), fd)); err == nil && strings.HasSuffix(path, suffix) {
			return path
		}
	}
	return ""
}

// sharedMemory makes some of System V's that every user may use.
func sharedMemory(t *testing.T) int {
	t.Helper()
	id, err := unix.SysvShmGet(unix.IPC_PRIVATE, 4096, 0o666)
	require.NoError(t, err)
	t.Cleanup(func() {
		_, err := unix.SysvShmCtl(id, unix.IPC_RMID, nil)
		require.NoError(t, err)
	})
	return id
}

// Refused asserts that each attack was tried, and failed.
func Refused(t *testing.T, results map[string]string, attacks ...Attack) {
	t.Helper()
	require.NotNil(t, results)
	for _, a := range attacks {
		why, tried := results[a.Name]
		assert.True(t, tried, a.Name)
		assert.NotEmpty(t, why, "a VMM can %s", a.Name)
		t.Logf("%s: %s", a.Name, why)
	}
}

// Done asserts that each of them was done: by a VMM that is not confined, so that the
// attempts are ones, or because a VMM has to be able to.
func Done(t *testing.T, results map[string]string, attacks ...Attack) {
	t.Helper()
	require.NotNil(t, results)
	for _, a := range attacks {
		if a.Alone {
			continue
		}
		why, tried := results[a.Name]
		assert.True(t, tried, a.Name)
		assert.Empty(t, why, "%s fails", a.Name)
	}
}

// End kills the VM at the end of the test, before its directory goes.
func (v *VM) End(t *testing.T) {
	t.Helper()
	t.Cleanup(func() { assert.NoError(t, errors.Join(v.Kill(Context(t)), v.Close())) })
}
