// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmmtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/api/transport"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// Suite is what Run needs to know of a driver.
type Suite struct {
	Driver vmm.Driver
	// Config makes a valid Config of a VM of its own, at most 2 vCPUs and little more than 1 GiB,
	// whose guest echoes what it gets on EchoPort and listens on no port from
	// EchoPort+1000 on.
	Config   func(t *testing.T) vmm.Config
	EchoPort uint32
	// TAP makes the queues of a network device; nil skips those cases.
	TAP func(t *testing.T) []*os.File
	// Limit bounds each step; software emulation on a busy host is slow.
	Limit time.Duration
}

// Run checks that a driver keeps vmm's contract, as far as that shows from outside.
func Run(t *testing.T, s Suite) {
	t.Run("probe", s.probe)
	t.Run("refuses a wrong configuration", s.wrongConfig)
	t.Run("lives", s.lives)
	t.Run("hot-plugs", s.hotplug)
	t.Run("hot-plugs block devices", s.blockDevices)
	t.Run("resizes", s.resize)
	t.Run("pauses", s.pause)
	t.Run("attaches", s.attach)
	t.Run("is killed", s.killed)
	t.Run("dies", s.dies)
	t.Run("ends while it is dialled", s.diesEarly)
	t.Run("takes calls at once", s.concurrent)
}

func (s *Suite) ctx(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), s.Limit)
	t.Cleanup(cancel)
	return ctx
}

// boot starts a VM that ends with the test.
func (s *Suite) boot(t *testing.T) vmm.VM {
	t.Helper()
	vm, err := s.Driver.Boot(s.ctx(t), s.Config(t))
	require.NoError(t, err)
	s.endWith(t, vm)
	return vm
}

func (s *Suite) endWith(t *testing.T, vm vmm.VM) {
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), s.Limit)
		defer cancel()
		assert.NoError(t, vm.Kill(ctx))
		assert.NoError(t, vm.Close())
		s.assertLeftovers(t, vm.State().Dir)
	})
}

// assertLeftovers checks that only logs are left in a VM's directory.
func (s *Suite) assertLeftovers(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	for _, e := range entries {
		name := strings.TrimSuffix(e.Name(), ".1")
		if name != vmm.ConsoleLog && name != vmm.VMMLog {
			t.Errorf("%s is left in the VM's directory", e.Name())
		}
	}
}

func (s *Suite) echo(t *testing.T, conn net.Conn) {
	t.Helper()
	require.NoError(t, conn.SetDeadline(time.Now().Add(s.Limit)))
	_, err := conn.Write([]byte("hello"))
	require.NoError(t, err)
	got := make([]byte, 5)
	_, err = io.ReadFull(conn, got)
	require.NoError(t, err)
	assert.Equal(t, "hello", string(got))
}

func (s *Suite) probe(t *testing.T) {
	h, err := s.Driver.Probe(s.ctx(t))
	require.NoError(t, err)
	assert.Equal(t, s.Driver.Name(), h.Driver)
	for name, v := range map[string]string{"binary": h.Binary, "version": h.Version, "accelerator": h.Accelerator, "reason": h.Reason} {
		assert.NotEmpty(t, v, name)
	}
}

func (s *Suite) wrongConfig(t *testing.T) {
	tests := map[string]func(*vmm.Config){
		"no kernel":         func(c *vmm.Config) { c.Kernel = "/nonexistent/vmlinux" },
		"a relative image":  func(c *vmm.Config) { c.RootFS = "rootfs.erofs" },
		"no memory":         func(c *vmm.Config) { c.Size.MemoryBytes = 0 },
		"odd memory":        func(c *vmm.Config) { c.Size.MemoryBytes++ },
		"no vCPUs":          func(c *vmm.Config) { c.Size.VCPUs = 0 },
		"less than at most": func(c *vmm.Config) { c.Max.MemoryBytes = vmm.MinMemory / 2 },
		"a long directory":  func(c *vmm.Config) { c.Dir += strings.Repeat("/.", 60) },
	}
	for name, change := range tests {
		t.Run(name, func(t *testing.T) {
			cfg := s.Config(t)
			dir := cfg.Dir
			change(&cfg)
			vm, err := s.Driver.Boot(s.ctx(t), cfg)
			if err == nil {
				s.endWith(t, vm)
			}
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			s.assertLeftovers(t, dir)
		})
	}
}

func (s *Suite) lives(t *testing.T) {
	vm := s.boot(t)
	ctx := s.ctx(t)
	state := vm.State()
	assert.Equal(t, s.Driver.Name(), state.Driver)
	assert.Equal(t, vm.ID(), state.ID)
	assert.NoError(t, unix.Kill(state.Pid, 0))

	conn, err := vm.Dial(ctx, s.EchoPort)
	require.NoError(t, err)
	defer conn.Close() //nolint:errcheck
	s.echo(t, conn)
	_, err = vm.Dial(ctx, s.EchoPort+1000)
	require.ErrorIs(t, err, errdefs.ErrNotFound)

	pod, err := transport.Open(vm.PodEndpoint())
	require.NoError(t, err)
	defer pod.Close() //nolint:errcheck
	conn, err = pod.Dial(ctx, s.EchoPort)
	require.NoError(t, err)
	s.echo(t, conn)

	entries, err := os.ReadDir(state.Dir)
	require.NoError(t, err)
	for _, e := range entries {
		assert.LessOrEqual(t, len(strings.TrimSuffix(e.Name(), ".1")), vmm.MaxDirName, e.Name())
	}
	select {
	case <-vm.Done():
		t.Fatalf("the VM has ended: %+v", vm.Exit())
	default:
	}
}

func (s *Suite) hotplug(t *testing.T) {
	vm := s.boot(t)
	ctx := s.ctx(t)
	s.dialOnce(ctx, t, vm)
	image, writable := filepath.Join(t.TempDir(), "image"), filepath.Join(t.TempDir(), "writable")
	for _, path := range []string{image, writable} {
		require.NoError(t, os.WriteFile(path, make([]byte, 1<<20), 0o600))
	}

	for _, bad := range []vmm.Disk{
		{Serial: "No!", Path: image}, {Serial: vmm.ImageSerial, Path: image}, {Serial: vmm.ScratchSerial, Path: image},
		{Serial: "a", Path: "image"}, {Serial: "a", Path: image + ".none"},
	} {
		_, err := vm.AddDisk(ctx, bad)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument, "%+v", bad)
	}
	assert.NoError(t, vm.RemoveDisk(ctx, "never-there"))
	for range 2 {
		seen := map[string]bool{}
		for _, serial := range []string{"a", "b", "c"} {
			disk := vmm.Disk{Serial: serial, Path: image, ReadOnly: true}
			if serial == "b" {
				disk.Path, disk.ReadOnly = writable, false
			}
			got, err := vm.AddDisk(ctx, disk)
			require.NoError(t, err)
			if got != vmm.ImageSerial || !disk.ReadOnly {
				require.Equal(t, serial, got)
			}
			require.False(t, seen[got], "two disks have the serial %s", got)
			seen[got] = true
			_, err = vm.AddDisk(ctx, disk)
			require.ErrorIs(t, err, errdefs.ErrAlreadyExists)
		}
		for _, serial := range []string{"a", "a", "c", "b"} {
			require.NoError(t, vm.RemoveDisk(ctx, serial))
		}
	}

	require.ErrorIs(t, vm.AddNIC(ctx, vmm.NIC{ID: "eth0"}), errdefs.ErrInvalidArgument)
	assert.NoError(t, vm.RemoveNIC(ctx, "eth9"))
	if s.TAP == nil {
		return
	}
	for range 2 {
		nic := vmm.NIC{ID: "eth0", MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, MTU: 1400, Queues: s.TAP(t)}
		require.NoError(t, vm.AddNIC(ctx, nic))
		require.ErrorIs(t, vm.AddNIC(ctx, nic), errdefs.ErrAlreadyExists)
		for _, f := range nic.Queues {
			require.NoError(t, f.Close())
		}
		require.NoError(t, vm.RemoveNIC(ctx, "eth0"))
		require.NoError(t, vm.RemoveNIC(ctx, "eth0"))
	}
}

// dialOnce waits until the guest is there.
func (s *Suite) dialOnce(ctx context.Context, t *testing.T, vm vmm.VM) {
	t.Helper()
	conn, err := vm.Dial(ctx, s.EchoPort)
	require.NoError(t, err)
	s.echo(t, conn)
	require.NoError(t, conn.Close())
}

func (s *Suite) resize(t *testing.T) {
	cfg := s.Config(t)
	vm, err := s.Driver.Boot(s.ctx(t), cfg)
	require.NoError(t, err)
	s.endWith(t, vm)
	ctx := s.ctx(t)
	s.dialOnce(ctx, t, vm)
	for _, bad := range []vmm.Size{
		{VCPUs: 0, MemoryBytes: cfg.Size.MemoryBytes},
		{VCPUs: cfg.Max.VCPUs + 1, MemoryBytes: cfg.Size.MemoryBytes},
		{VCPUs: 1, MemoryBytes: cfg.Size.MemoryBytes - vmm.MemoryUnit},
		{VCPUs: 1, MemoryBytes: cfg.Size.MemoryBytes + 1},
		{VCPUs: 1, MemoryBytes: cfg.Max.MemoryBytes + vmm.MemoryUnit},
	} {
		require.ErrorIs(t, vm.Resize(ctx, bad), errdefs.ErrInvalidArgument, "%+v", bad)
	}
	require.NoError(t, vm.Resize(ctx, cfg.Max))
	// A guest need not give all back, which the driver then tells.
	err = vm.Resize(ctx, cfg.Size)
	if kept := (*vmm.KeptError)(nil); !errors.As(err, &kept) {
		require.NoError(t, err)
	} else {
		require.Greater(t, kept.MemoryBytes, cfg.Size.MemoryBytes)
	}
}

func (s *Suite) pause(t *testing.T) {
	vm := s.boot(t)
	ctx := s.ctx(t)
	s.dialOnce(ctx, t, vm)
	require.NoError(t, vm.Pause(ctx))
	require.NoError(t, vm.Pause(ctx))
	require.NoError(t, vm.Resume(ctx))
	require.NoError(t, vm.Resume(ctx))
	s.dialOnce(ctx, t, vm)
}

func (s *Suite) attach(t *testing.T) {
	cfg := s.Config(t)
	vm, err := s.Driver.Boot(s.ctx(t), cfg)
	require.NoError(t, err)
	ended := false
	defer func() {
		if !ended {
			_ = unix.Kill(vm.State().Pid, unix.SIGKILL)
		}
	}()
	ctx := s.ctx(t)
	s.dialOnce(ctx, t, vm)
	image := filepath.Join(t.TempDir(), "image")
	require.NoError(t, os.WriteFile(image, make([]byte, 1<<20), 0o600))
	for _, serial := range []string{"kept", "kept-too"} {
		_, err := vm.AddDisk(ctx, vmm.Disk{Serial: serial, Path: image, ReadOnly: true})
		require.NoError(t, err)
	}

	for range 3 {
		state := roundTrip(t, vm.State())
		require.NoError(t, vm.Close())
		require.NoError(t, vm.Close())
		for name, other := range otherStates(state) {
			_, err := s.Driver.Attach(ctx, other)
			require.ErrorIs(t, err, errdefs.ErrNotFound, name)
		}
		vm, err = s.Driver.Attach(ctx, state)
		require.NoError(t, err)
		assert.Equal(t, state, roundTrip(t, vm.State()))
		s.dialOnce(ctx, t, vm)
	}
	for _, serial := range []string{"kept", "kept-too"} {
		_, err := vm.AddDisk(ctx, vmm.Disk{Serial: serial, Path: image, ReadOnly: true})
		require.ErrorIs(t, err, errdefs.ErrAlreadyExists)
		require.NoError(t, vm.RemoveDisk(ctx, serial))
	}

	state := vm.State()
	require.NoError(t, vm.Kill(ctx))
	ended = true
	assert.True(t, vm.Exit().Requested)
	require.NoError(t, vm.Close())
	_, err = s.Driver.Attach(ctx, state)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	s.assertLeftovers(t, cfg.Dir)
}

// otherStates describe processes that are not the VM, though its pid may be right.
func otherStates(s vmm.State) map[string]vmm.State {
	start, boot, none, self := s, s, s, s
	start.StartTime++
	boot.BootID = "00000000-0000-0000-0000-000000000000"
	none.Pid = 1 << 22
	self.Pid = os.Getpid()
	return map[string]vmm.State{"start time": start, "boot ID": boot, "no such pid": none, "another process": self}
}

func roundTrip(t *testing.T, s vmm.State) vmm.State {
	t.Helper()
	b, err := json.Marshal(s)
	require.NoError(t, err)
	var out vmm.State
	require.NoError(t, json.Unmarshal(b, &out))
	return out
}

func (s *Suite) killed(t *testing.T) {
	vm := s.boot(t)
	ctx := s.ctx(t)
	for range 2 {
		require.NoError(t, vm.Kill(ctx))
	}
	s.assertEnded(t, vm)
	assert.True(t, vm.Exit().Requested)
}

// assertEnded checks what a VM says after its end.
func (s *Suite) assertEnded(t *testing.T, vm vmm.VM) {
	t.Helper()
	ctx := s.ctx(t)
	select {
	case <-vm.Done():
	case <-ctx.Done():
		t.Fatal("the VM's end goes unnoticed")
	}
	assert.NotEmpty(t, vm.Exit().Cause)
	assert.WithinDuration(t, time.Now(), vm.Exit().At, s.Limit)
	assert.NotEmpty(t, vm.ID())
	assert.NotZero(t, vm.State().Pid)
	image := filepath.Join(t.TempDir(), "image")
	require.NoError(t, os.WriteFile(image, make([]byte, 1<<20), 0o600))
	calls := map[string]func() error{
		"dial":        func() error { _, err := vm.Dial(ctx, s.EchoPort); return err },
		"add disk":    func() error { _, err := vm.AddDisk(ctx, vmm.Disk{Serial: "a", Path: image}); return err },
		"remove disk": func() error { return vm.RemoveDisk(ctx, "a") },
		"remove nic":  func() error { return vm.RemoveNIC(ctx, "a") },
		"resize":      func() error { return vm.Resize(ctx, vmm.Size{VCPUs: 1, MemoryBytes: s.size(t).MemoryBytes}) },
		"pause":       func() error { return vm.Pause(ctx) },
		"resume":      func() error { return vm.Resume(ctx) },
	}
	for name, call := range calls {
		assert.ErrorIs(t, call(), errdefs.ErrUnavailable, name)
	}
	assert.NoError(t, vm.Kill(ctx))
}

func (s *Suite) size(t *testing.T) vmm.Size { return s.Config(t).Size }

func (s *Suite) dies(t *testing.T) {
	vm := s.boot(t)
	conn, err := vm.Dial(s.ctx(t), s.EchoPort)
	require.NoError(t, err)
	defer conn.Close() //nolint:errcheck
	s.echo(t, conn)
	read := make(chan error, 1)
	go func() {
		_, err := conn.Read(make([]byte, 1))
		read <- err
	}()
	require.NoError(t, conn.SetDeadline(time.Time{}))
	began := time.Now()
	require.NoError(t, unix.Kill(vm.State().Pid, unix.SIGKILL))
	require.ErrorIs(t, <-read, errdefs.ErrUnavailable)
	<-vm.Done()
	assert.Less(t, time.Since(began), 5*time.Second)
	s.assertEnded(t, vm)
	assert.False(t, vm.Exit().Requested)
	assert.Contains(t, vm.Exit().Cause, "signal 9")
}

// diesEarly ends a VM while somebody waits for its guest.
func (s *Suite) diesEarly(t *testing.T) {
	vm := s.boot(t)
	done := make(chan error, 1)
	go func() {
		for {
			conn, err := vm.Dial(s.ctx(t), s.EchoPort)
			if err != nil {
				done <- err
				return
			}
			_ = conn.Close()
		}
	}()
	require.NoError(t, unix.Kill(vm.State().Pid, unix.SIGKILL))
	require.ErrorIs(t, <-done, errdefs.ErrUnavailable)
}

func (s *Suite) concurrent(t *testing.T) {
	vm := s.boot(t)
	ctx := s.ctx(t)
	s.dialOnce(ctx, t, vm)
	image := filepath.Join(t.TempDir(), "image")
	require.NoError(t, os.WriteFile(image, make([]byte, 1<<20), 0o600))
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			serial := fmt.Sprintf("disk-%d", i)
			_, err := vm.AddDisk(ctx, vmm.Disk{Serial: serial, Path: image, ReadOnly: true})
			assert.NoError(t, err)
			assert.NoError(t, vm.RemoveDisk(ctx, serial))
		})
		wg.Go(func() {
			conn, err := vm.Dial(ctx, s.EchoPort)
			if assert.NoError(t, err) {
				_ = conn.Close()
			}
		})
		wg.Go(func() { _ = vm.State() })
	}
	wg.Wait()
	// Some are under way when the VM ends.
	var errs [8]error
	for i := range errs {
		wg.Go(func() {
			for errs[i] == nil {
				errs[i] = vm.Resize(ctx, s.size(t))
			}
		})
	}
	require.NoError(t, vm.Kill(ctx))
	wg.Wait()
	assert.Equal(t, -1, slices.IndexFunc(errs[:], func(err error) bool { return !errdefs.IsUnavailable(err) }), "%v", errs)
}
