// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package cloudhypervisor

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/vmpool/confine/attack"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// attackUID and those after it are the users of VMMs in these tests.
const attackUID = 1879048192 + 4300

// node is a host with the driver, whose hypervisor is this test's program.
type node struct {
	*attack.Host
	accelerator string
}

func newNode(t *testing.T) *node {
	t.Helper()
	return &node{Host: attack.NewHost(t, "cloud-hypervisor"), accelerator: vmm.AccelTCG}
}

func (n *node) driver() *Driver {
	d := New(n.Program)
	d.host = vmm.Host{Binary: n.Program, Accelerator: n.accelerator}
	return d
}

// config is a VM's. What is readable to all on a node is so here.
func (n *node) config(t *testing.T, uid uint32, group string) vmm.Config {
	t.Helper()
	cfg := n.Config(t, uid, group)
	cfg.Kernel = filepath.Join(filepath.Dir(cfg.RootFS), "vmlinux")
	require.NoError(t, os.WriteFile(cfg.Kernel, nil, 0o644))
	require.NoError(t, os.Chmod(cfg.RootFS, 0o644))
	return cfg
}

// boot boots a VM, as a template if its memory is to be kept.
func (n *node) boot(t *testing.T, uid uint32, group string, template bool) *attack.VM {
	t.Helper()
	cfg := n.config(t, uid, group)
	if template {
		cfg.MemoryFile = filepath.Join(n.Template, memoryName)
	}
	vm, err := n.driver().Boot(attack.Context(t), cfg)
	require.NoError(t, err)
	v := &attack.VM{VM: vm, Config: cfg, Socket: apiSocket}
	v.End(t)
	return v
}

// snapshot makes one, by a template of that user.
func (n *node) snapshot(t *testing.T, uid uint32) vmm.Snapshot {
	t.Helper()
	v := n.boot(t, uid, "", true)
	require.NoError(t, v.Pause(attack.Context(t)))
	snap, err := v.Snapshot(attack.Context(t))
	require.NoError(t, err)
	require.NoError(t, v.Kill(attack.Context(t)))
	return snap
}

func (n *node) restore(t *testing.T, uid uint32, from vmm.Snapshot) *attack.VM {
	t.Helper()
	cfg := n.config(t, uid, "")
	vm, err := n.driver().Restore(attack.Context(t), cfg, from)
	require.NoError(t, err)
	v := &attack.VM{VM: vm, Config: cfg, Socket: apiSocket}
	v.End(t)
	return v
}

// plug gives a VM disks, of which it has one no more.
func plug(t *testing.T, v *attack.VM) (gone string) {
	t.Helper()
	for serial, readOnly := range map[string]bool{lentImage: true, lentVolume: false, takenBack: false} {
		path := filepath.Join(filepath.Dir(v.Config.Scratch), v.ID()+"-"+serial)
		require.NoError(t, os.WriteFile(path, make([]byte, 64<<10), 0o600))
		_, err := v.AddDisk(attack.Context(t), vmm.Disk{Serial: serial, Path: path, ReadOnly: readOnly})
		require.NoError(t, err)
	}
	require.NoError(t, v.RemoveDisk(attack.Context(t), takenBack))
	return filepath.Join(filepath.Dir(v.Config.Scratch), v.ID()+"-"+takenBack)
}

// lure is attack.VM.Lure, with what the driver has given to both, and with the snapshot
// of that directory if the VM has none.
func lure(t *testing.T, v, neighbour *attack.VM, snapshot string) *attack.Targets {
	t.Helper()
	what := v.Lure(t, neighbour)
	if what.Memory == "" {
		what.Memory = filepath.Join(snapshot, memoryName) // its neighbours', of which it has nothing
	}
	what.Files = map[string]string{
		targetOwn: filepath.Join(v.Config.Dir, ownDir), targetOtherOwn: filepath.Join(neighbour.Config.Dir, ownDir),
		targetDisks: vmm.DisksDir(v.Config.Scratch), targetOtherDisks: vmm.DisksDir(neighbour.Config.Scratch),
		targetKernel: v.Config.Kernel, targetConfig: filepath.Join(filepath.Dir(what.Memory), configName),
		targetTakenBack: plug(t, v),
	}
	if v.Config.UID == 0 {
		// Nothing is lent to it: it has disks where they are.
		require.NoError(t, os.Mkdir(what.Files[targetDisks], 0o700))
		t.Cleanup(func() { require.NoError(t, os.RemoveAll(what.Files[targetDisks])) })
		for _, serial := range []string{lentImage, lentVolume} {
			require.NoError(t, os.WriteFile(filepath.Join(what.Files[targetDisks], serial), make([]byte, 64<<10), 0o600))
		}
	}
	return what
}

// always are what no VMM must be able to do.
var always = slices.Concat(attack.Files, attack.Processes, attack.Sockets, ownAttacks)

// TestTakenOver has a VMM do what it must not be able to, and what it must. An
// unconfined one does the same, and can: so the attempts are ones.
func TestTakenOver(t *testing.T) {
	n := newNode(t)
	snap := n.snapshot(t, attackUID)
	neighbour := n.restore(t, attackUID+1, snap)
	plug(t, neighbour)
	attacks := slices.Concat(always, attack.Snapshot, configAttacks)

	t.Run("booted", func(t *testing.T) {
		v := n.boot(t, attackUID+2, "", false)
		results := v.Try(t, lure(t, v, neighbour, snap.Dir))
		attack.Refused(t, results, slices.Concat(attacks, restoredNeeds)...)
		attack.Done(t, results, needs...)
		sockets(t, v)
	})
	t.Run("restored", func(t *testing.T) {
		v := n.restore(t, attackUID+2, snap)
		results := v.Try(t, lure(t, v, neighbour, n.Template))
		attack.Refused(t, results, slices.Concat(attacks, attack.Held)...) // TestTemplateTakenOver shows that those are ones
		attack.Done(t, results, slices.Concat(needs, restoredNeeds)...)
		sockets(t, v)
	})
	t.Run("not confined", func(t *testing.T) {
		v := n.restore(t, 0, snap)
		results := v.Try(t, lure(t, v, neighbour, n.Template))
		attack.Done(t, results, slices.Concat(attacks, needs, restoredNeeds)...)
	})
}

// sockets asserts that a VM's are where they were, and its own.
func sockets(t *testing.T, v *attack.VM) {
	t.Helper()
	for _, name := range []string{consoleSocket, guestSocket} {
		conn, err := net.Dial("unix", filepath.Join(v.Config.Dir, ownDir, name))
		require.NoError(t, err)
		raw, err := conn.(*net.UnixConn).SyscallConn()
		require.NoError(t, err)
		require.NoError(t, raw.Control(func(fd uintptr) {
			peer, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
			assert.NoError(t, err)
			assert.Equal(t, v.Config.UID, peer.Uid)
		}))
		require.NoError(t, conn.Close())
	}
}

// TestTemplateTakenOver has one do so that is to become a snapshot. Its files are its own
// until they are complete; then it has but what it has open, until it is killed.
func TestTemplateTakenOver(t *testing.T) {
	n := newNode(t)
	neighbour := n.boot(t, attackUID+1, "", false)
	plug(t, neighbour)
	v := n.boot(t, attackUID, "", true)
	what := lure(t, v, neighbour, n.Template)
	results := v.Try(t, what)
	attack.Refused(t, results, always...)
	attack.Done(t, results, slices.Concat(needs, templateNeeds)...)

	require.NoError(t, v.Pause(attack.Context(t)))
	snap, err := v.Snapshot(attack.Context(t))
	require.NoError(t, err)
	sealed := slices.Concat(attack.Snapshot, configAttacks, templateNeeds[1:])
	results = v.Try(t, what)
	attack.Refused(t, results, slices.Concat(always, sealed)...)
	attack.Done(t, results, attack.Held...)
	entries, err := os.ReadDir(snap.Dir)
	require.NoError(t, err)
	for _, e := range entries {
		uid, mode := ownerAndMode(t, filepath.Join(snap.Dir, e.Name()))
		assert.Zero(t, uid, e.Name())
		assert.Equal(t, os.FileMode(0o444), mode, e.Name())
	}
}

// A hypervisor that says that it has not got a disk keeps nothing of it.
func TestRefusedDiskIsTakenBack(t *testing.T) {
	n := newNode(t)
	v := n.boot(t, attackUID, "", false)
	answer := filepath.Join(v.Config.Dir, ownDir, answerFile)
	require.NoError(t, os.WriteFile(answer, []byte(answer500), 0o644))
	path := filepath.Join(filepath.Dir(v.Config.Scratch), "volume")
	require.NoError(t, os.WriteFile(path, nil, 0o600))
	_, err := v.AddDisk(attack.Context(t), vmm.Disk{Serial: lentVolume, Path: path})
	require.ErrorIs(t, err, errdefs.ErrUnknown)
	require.NoFileExists(t, filepath.Join(vmm.DisksDir(v.Config.Scratch), lentVolume))
	uid, _ := ownerAndMode(t, path)
	require.Zero(t, uid)
	require.NoError(t, os.Remove(answer))
	_, err = v.AddDisk(attack.Context(t), vmm.Disk{Serial: lentVolume, Path: path})
	require.NoError(t, err)
}

func TestTakenOverMultiplies(t *testing.T) {
	attack.Multiplies(t, maxThreads, func(group string) *attack.VM { return newNode(t).boot(t, attackUID+3, group, false) })
}

func TestTakenOverTakesMemory(t *testing.T) {
	attack.TakesMemory(t, overhead, maxThreads, func(group string) *attack.VM { return newNode(t).boot(t, attackUID+3, group, false) })
}

// envDevices says that this process has a /dev of its own.
const envDevices = "ATTACK_DEVICES"

// TestTakenOverDevice has a VMM open the accelerator's device, which is its group's, and
// another one. Both are made for it, in a mount namespace of the test's own.
func TestTakenOverDevice(t *testing.T) {
	needRoot(t)
	if os.Getenv(envDevices) == "" {
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestTakenOverDevice$", "-test.v")
		cmd.Env = append(os.Environ(), envDevices+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
		out, err := cmd.CombinedOutput()
		t.Logf("%s", out)
		require.NoError(t, err)
		if bytes.Contains(out, []byte("--- SKIP")) {
			t.Skip("no devices of its own")
		}
		require.Contains(t, string(out), "--- PASS")
		return
	}
	const group = attackUID + 100
	devices(t, group)
	n := newNode(t)
	n.accelerator = vmm.AccelKVM
	neighbour := n.boot(t, attackUID+1, "", false)
	for _, uid := range []uint32{attackUID, 0} {
		v := n.boot(t, uid, "", false)
		what := lure(t, v, neighbour, n.Template)
		what.Files[targetGroup] = strconv.Itoa(group)
		results := v.Try(t, what)
		attack.Done(t, results, deviceNeeds...)
		if uid == 0 {
			attack.Done(t, results, deviceAttacks...)
			continue
		}
		attack.Refused(t, results, deviceAttacks...)
		require.Empty(t, results[deviceNeeds[1].Name])
	}
}

// devices makes a /dev.
func devices(t *testing.T, group int) {
	t.Helper()
	require.NoError(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	if err := unix.Mount("tmpfs", "/dev", "tmpfs", 0, "size=64k,mode=755"); err != nil {
		t.Skipf("no /dev of its own: %v", err)
	}
	const null, urandom = 3, 9
	for name, minor := range map[string]uint32{"null": null, "urandom": urandom, "kvm": null, "other": null} {
		path := filepath.Join("/dev", name)
		if err := unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(1, minor))); err != nil {
			t.Skipf("no devices: %v", err)
		}
		mode := os.FileMode(0o666)
		if minor == null && name != "null" {
			require.NoError(t, os.Chown(path, 0, group))
			mode = 0o660
		}
		require.NoError(t, os.Chmod(path, mode))
	}
}
