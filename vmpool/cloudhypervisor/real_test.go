// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package cloudhypervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/api/transport"
	"github.com/cloudhv/containerd-cloudhv/vmpool/process"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmmtest/realvm"
)

// binary is what the tests with the real hypervisor run; empty is the one on PATH.
func binary() string { return os.Getenv("CLOUD_HYPERVISOR") }

// missing says why the real hypervisor cannot run here.
func missing() error {
	_, err := New(binary()).Probe(context.Background())
	return err
}

func suite() *realvm.Suite {
	return &realvm.Suite{Driver: New(binary()), Missing: missing, StateFile: stateName, PlugsVCPUs: true, LateHotPlug: true, LateConsole: true}
}

func TestRealVMs(t *testing.T) { suite().Run(t) }

// real skips a test where the hypervisor cannot run.
func real(t *testing.T) *realvm.Suite {
	t.Helper()
	s := suite()
	s.Need(t)
	return s
}

// A clone has the network device of its template, on a TAP of its own.
func TestBuiltInNIC(t *testing.T) {
	s := real(t)
	dir := realvm.Dir(t)
	v := s.Boot(t, func(c *vmm.Config) {
		c.MemoryFile, c.TAP = realvm.MemoryPath(dir), realvm.TAP(t, 1)[0]
	})
	ctx := realvm.Context(t)
	assert.Equal(t, vmm.BuiltInMAC, v.MustRun("cat /sys/class/net/eth0/address"))
	require.NoError(t, v.Disconnect(ctx))
	require.NoError(t, v.Pause(ctx))
	snap, err := v.Snapshot(ctx)
	require.NoError(t, err)
	require.NoError(t, v.Kill(ctx))
	require.NoError(t, v.Cfg.TAP.Close())

	cfg := s.Config(t)
	_, err = s.Driver.Restore(ctx, cfg, snap)
	require.ErrorContains(t, err, "network device")
	cfg.TAP = realvm.TAP(t, 1)[0]
	vm, err := s.Driver.Restore(ctx, cfg, snap)
	require.NoError(t, err)
	require.NoError(t, cfg.TAP.Close(), "the VM has its own")
	c := realvm.Take(t, vm, cfg)
	assert.Equal(t, vmm.BuiltInMAC, c.MustRun("cat /sys/class/net/eth0/address"))
}

// A snapshot stays what it was when its directory is moved, as the store of snapshots
// does.
func TestSnapshotsMove(t *testing.T) {
	s := real(t)
	snap := s.Template(t, nil)
	moved := filepath.Join(realvm.Dir(t), "moved")
	require.NoError(t, os.Rename(snap.Dir, moved))
	snap.Dir = moved
	assert.NotEmpty(t, s.Clone(t, snap).MustRun("cat /proc/version"))
	text, err := os.ReadFile(filepath.Join(moved, configName))
	require.NoError(t, err)
	assert.NotContains(t, string(text), os.TempDir(), "a template names none of its own paths")
}

// With too few file descriptors nothing starts, and what runs goes on.
func TestShortOfFiles(t *testing.T) {
	s := real(t)
	program, err := New(binary()).Probe(t.Context())
	require.NoError(t, err)
	wrapper := filepath.Join(realvm.Dir(t), "cloud-hypervisor")
	script := fmt.Sprintf("#!/bin/sh\n[ \"$1\" = --version ] || ulimit -n 24\nexec %s \"$@\"\n", program.Binary)
	require.NoError(t, os.WriteFile(wrapper, []byte(script), 0o755)) //nolint:gosec // it is run
	cfg := s.Config(t)
	cfg.UID = 0 // one that is confined runs no script
	_, err = New(wrapper).Boot(realvm.Context(t), cfg)
	require.Error(t, err)
	t.Log(err)
	assert.Contains(t, err.Error(), "Too many open files")
	assertLogsOnly(t, cfg.Dir)

	v := s.Boot(t)
	v.MustRun("cat /proc/version")
	ctx := realvm.Context(t)
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", v.State().Pid))
	require.NoError(t, err)
	few := unix.Rlimit{Cur: uint64(len(open)), Max: 4096}
	var before unix.Rlimit
	require.NoError(t, unix.Prlimit(v.State().Pid, unix.RLIMIT_NOFILE, &few, &before))
	image := filepath.Join(t.TempDir(), "image")
	require.NoError(t, os.WriteFile(image, make([]byte, 1<<20), 0o600))
	within, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	_, err = v.AddDisk(within, vmm.Disk{Serial: "a", Path: image, ReadOnly: true})
	require.Error(t, err)
	t.Log(err)
	require.NoError(t, unix.Prlimit(v.State().Pid, unix.RLIMIT_NOFILE, &before, nil))
	v.Add(vmm.Disk{Serial: "a", Path: image, ReadOnly: true})
	v.AwaitDisk("a")
}

// clones are how many there are in TestClones.
const clones = 24

// TestClones makes many clones: they share what they have not written, none has
// another's randomness, each grows and shrinks, and the template stays as it was.
func TestClones(t *testing.T) {
	s := real(t)
	dir := realvm.Dir(t)
	template := s.Boot(t, func(c *vmm.Config) { c.MemoryFile, c.Max.VCPUs = realvm.MemoryPath(dir), 3 })
	ctx := realvm.Context(t)
	template.MustRun("cat /proc/version")
	require.NoError(t, template.Disconnect(ctx))
	require.NoError(t, template.Pause(ctx))
	snap, err := template.Snapshot(ctx)
	require.NoError(t, err)
	require.NoError(t, template.Kill(ctx))
	before := realvm.HashFile(t, realvm.MemoryPath(dir))

	bare := bareClones(t, s, snap)
	began := time.Now()
	vms := make([]*realvm.VM, clones)
	for i := range vms {
		vms[i] = s.Clone(t, snap)
	}
	for _, v := range vms {
		v.MustRun("cat /proc/version")
	}
	t.Logf("%d clones run after %v", clones, time.Since(began))
	ours := pss(t, vms)
	t.Logf("PSS: %d MiB, bare %d MiB", ours>>20, bare>>20)
	assert.LessOrEqual(t, float64(ours), 1.2*float64(bare))

	streams := map[string]bool{}
	for i, v := range vms {
		v.MustRun(fmt.Sprintf("reseed %d", i))
		streams[v.MustRun("random")] = true
	}
	assert.Len(t, streams, clones, "two clones have the same random numbers")
	var g errgroup.Group
	g.SetLimit(4)
	for _, v := range vms {
		g.Go(func() error { return grow(v) })
	}
	require.NoError(t, g.Wait())
	assert.Equal(t, before, realvm.HashFile(t, realvm.MemoryPath(dir)), "the template was changed")
}

// grow resizes a clone up and down again.
func grow(v *realvm.VM) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*realvm.Limit)
	defer cancel()
	before := v.Memory()
	if err := v.Resize(ctx, vmm.Size{VCPUs: 3, MemoryBytes: 1 << 30}); err != nil {
		return fmt.Errorf("grow VM %s: %w", v.ID(), err)
	}
	v.Eventually("cat /proc/meminfo", func(string) bool { return v.Memory() > before+800 })
	v.Eventually("cat /sys/devices/system/cpu/present", func(got string) bool { return got == "0-2" })
	for {
		err := v.Resize(ctx, vmm.Size{VCPUs: 1, MemoryBytes: 128 << 20})
		var kept *vmm.KeptError
		if errors.As(err, &kept) && kept.MemoryBytes > 160<<20 && ctx.Err() == nil {
			continue // the guest is hurried
		}
		if err != nil && kept == nil {
			return fmt.Errorf("shrink VM %s: %w", v.ID(), err)
		}
		break
	}
	v.Eventually("cat /sys/devices/system/cpu/present", func(got string) bool { return got == "0" })
	v.Eventually("cat /proc/meminfo", func(string) bool { return v.Memory() <= before+32 })
	return nil
}

// bareClones is the PSS of as many clones that are made by hand, without a driver.
func bareClones(t *testing.T, s *realvm.Suite, snap vmm.Snapshot) (sum int64) {
	t.Helper()
	program, err := New(binary()).Probe(t.Context())
	require.NoError(t, err)
	var pids []int
	for range clones {
		cfg := s.Config(t)
		require.NoError(t, link(cfg, &snap))
		own := filepath.Join(cfg.Dir, ownDir)
		cmd := exec.Command(program.Binary, "--api-socket", "api", "--restore", restoreArg(cfg.Dir, false))
		cmd.Dir = own
		require.NoError(t, cmd.Start())
		defer cmd.Wait()         //nolint:errcheck // killed
		defer cmd.Process.Kill() //nolint:errcheck
		pids = append(pids, cmd.Process.Pid)
		// Its name is there before it is listened on.
		require.Eventually(t, func() bool {
			conn, err := net.Dial("unix", filepath.Join(own, guestSocket))
			return err == nil && conn.Close() == nil
		}, realvm.Limit, 5*time.Millisecond)
		guest, err := transport.Open(transport.VsockEndpoint(filepath.Join(own, guestSocket), transport.VsockVM))
		require.NoError(t, err)
		defer guest.Close() //nolint:errcheck
		conn, err := guest.Dial(realvm.Context(t), realvm.PortRun)
		require.NoError(t, err)
		_, err = io.WriteString(conn, "cat /proc/version\n")
		require.NoError(t, err)
		_, err = io.ReadAll(conn)
		require.NoError(t, err)
	}
	for _, pid := range pids {
		sum += pssOf(t, pid)
	}
	return sum
}

// pss adds up what VMs hold of the host's memory.
func pss(t *testing.T, vms []*realvm.VM) (sum int64) {
	t.Helper()
	for _, v := range vms {
		sum += pssOf(t, v.State().Pid)
	}
	return sum
}

func pssOf(t *testing.T, pid int) int64 {
	t.Helper()
	id, err := process.Identify(pid)
	require.NoError(t, err)
	n, err := id.PSS()
	require.NoError(t, err)
	return n
}
