// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package realvm

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
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

func (s *Suite) howVMsEnd(t *testing.T) {
	tests := map[string]struct {
		command   string
		cause     string
		requested bool
	}{
		"power off": {command: "poweroff", cause: "guest powered off", requested: true},
		"reboot":    {command: "reboot", cause: "guest rebooted"},
		"panic":     {command: "panic", cause: "guest kernel panic: \"sysrq triggered crash\""},
		"init ends": {command: "exit", cause: "guest kernel panic: \"Attempted to kill init! exitcode=0x00000300\""},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			v := s.Boot(t)
			v.MustRun("cat /proc/version")
			_, err := v.Run(tc.command)
			require.ErrorIs(t, err, errdefs.ErrUnavailable)
			select {
			case <-v.Done():
			case <-time.After(Limit):
				t.Fatal("the VM goes on")
			}
			exit := v.Exit()
			assert.Equal(t, tc.cause, exit.Cause)
			assert.Equal(t, tc.requested, exit.Requested)
		})
	}
}

// bootFailure has QEMU itself refuse: its words are in the error, and nothing is left.
func (s *Suite) bootFailure(t *testing.T) {
	cfg := s.Config(t)
	cfg.Kernel = cfg.Dir // is there, but is none
	cfg.CgroupPath = fmt.Sprintf("/chv-test-%d", os.Getpid())
	vm, err := s.Driver.Boot(Context(t), cfg)
	if err == nil {
		(&VM{VM: vm, t: t, Cfg: cfg}).End()
	}
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	assert.Contains(t, err.Error(), "exited with code 1")
	entries, err := os.ReadDir(cfg.Dir)
	require.NoError(t, err)
	for _, e := range entries {
		assert.Contains(t, []string{vmm.ConsoleLog, vmm.VMMLog}, e.Name())
	}
	assertNoCgroup(t, cfg.CgroupPath)
}

func assertNoCgroup(t *testing.T, path string) {
	t.Helper()
	left, err := filepath.Glob("/sys/fs/cgroup/*" + path)
	require.NoError(t, err)
	assert.Empty(t, left)
	assert.NoDirExists(t, "/sys/fs/cgroup"+path)
}

func (s *Suite) cgroup(t *testing.T) {
	group := fmt.Sprintf("/chv-test-%d", os.Getpid())
	if vmm.OpenCgroup(group).Make() != nil {
		t.Skip("cannot make cgroups")
	}
	v := s.Boot(t, func(c *vmm.Config) { c.CgroupPath = group })
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", v.State().Pid))
	require.NoError(t, err)
	assert.Contains(t, string(b), group+"\n")
	require.NoError(t, v.Kill(Context(t)))
	assertNoCgroup(t, group)
}

// killNoticed measures how soon the end of a VMM is known.
func (s *Suite) killNoticed(t *testing.T) {
	v := s.Boot(t)
	v.MustRun("cat /proc/version")
	conn, err := v.Dial(Context(t), PortEcho)
	require.NoError(t, err)
	defer conn.Close() //nolint:errcheck
	began := time.Now()
	require.NoError(t, unix.Kill(v.State().Pid, unix.SIGKILL))
	_, err = conn.Read(make([]byte, 1))
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
	lost := time.Since(began)
	<-v.Done()
	t.Logf("connection lost after %v, end told after %v", lost, time.Since(began))
}

// stuckGuest has a paused VM: calls that need the guest end by their own
// limits, and Kill works.
func (s *Suite) stuckGuest(t *testing.T) {
	v := s.Boot(t)
	v.MustRun("cat /proc/version")
	ctx := Context(t)
	img := filepath.Join(t.TempDir(), "image")
	require.NoError(t, os.WriteFile(img, make([]byte, 64<<10), 0o600))
	v.Add(vmm.Disk{Serial: "a", Path: img})
	v.AwaitDisk("a")
	require.NoError(t, v.Pause(ctx))
	short, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	_, err := v.Dial(short, PortEcho)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorIs(t, v.RemoveDisk(short, "a"), context.DeadlineExceeded)
	require.NoError(t, v.Resume(ctx))
	require.NoError(t, v.RemoveDisk(ctx, "a"))
	assert.NotContains(t, v.Disks(), "a")
}

// console has a guest that prints without end, also while nobody reads.
func (s *Suite) console(t *testing.T) {
	v := s.Boot(t, func(c *vmm.Config) { c.ConsoleLimit = 8 << 10 })
	v.MustRun("spam 2000")
	log := filepath.Join(v.Cfg.Dir, vmm.ConsoleLog)
	require.Eventually(t, func() bool {
		if strings.Contains(string(vmm.Tail(log, 4<<10))+string(vmm.Tail(log+".1", 4<<10)), "spam 1999") {
			return true
		}
		if s.LateConsole {
			v.MustRun("spam 1")
		}
		return false
	}, Limit, 50*time.Millisecond)
	var total int64
	for _, name := range []string{log, log + ".1"} {
		info, err := os.Stat(name)
		require.NoError(t, err)
		total += info.Size()
	}
	assert.LessOrEqual(t, total, int64(8<<10))

	state := v.State()
	require.NoError(t, v.Close())
	require.Eventually(t, func() bool {
		vm, err := s.Driver.Attach(Context(t), state)
		if err == nil {
			v.VM = vm
		}
		return err == nil
	}, Limit, 10*time.Millisecond)
	v.MustRun("spam 10")
	require.Eventually(t, func() bool {
		return strings.Contains(string(vmm.Tail(log, 4<<10))+string(vmm.Tail(log+".1", 4<<10)), "spam 9 ")
	}, Limit, 50*time.Millisecond)
}

// idleGuest measures what a guest costs that no host talks to.
func (s *Suite) idleGuest(t *testing.T) {
	v := s.Boot(t)
	v.MustRun("cat /proc/version")
	state := v.State()
	require.NoError(t, v.Close())
	before := cpuTicks(t, state.Pid)
	const wait = 5 * time.Second
	time.Sleep(wait)
	used := time.Duration(cpuTicks(t, state.Pid)-before) * 10 * time.Millisecond
	t.Logf("%v of processor time in %v", used, wait)
	assert.Less(t, used, wait/10)
	vm, err := s.Driver.Attach(Context(t), state)
	require.NoError(t, err)
	v.VM = vm
}

func cpuTicks(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	require.NoError(t, err)
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	user, err := strconv.Atoi(f[11])
	require.NoError(t, err)
	system, err := strconv.Atoi(f[12])
	require.NoError(t, err)
	return user + system
}

// twentyAtOnce boots many VMs on a host with few processors.
func (s *Suite) twentyAtOnce(t *testing.T) {
	began := time.Now()
	var vms [20]*VM
	for i := range vms {
		vms[i] = &VM{t: t, Cfg: s.Config(t)}
	}
	var wg sync.WaitGroup
	for _, v := range vms {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), 2*Limit)
			defer cancel()
			vm, err := s.Driver.Boot(ctx, v.Cfg)
			if !assert.NoError(t, err) {
				return
			}
			v.VM = vm
			conn, err := vm.Dial(ctx, PortEcho)
			if assert.NoError(t, err) {
				assert.NoError(t, conn.Close())
			}
		})
	}
	wg.Wait()
	t.Logf("20 VMs answer after %v", time.Since(began))
	for _, v := range vms {
		if v.VM != nil {
			v.End()
		}
	}
}

// killedClients kills a process that is in the middle of a transfer, fifty
// times: the next one gets a clean session at once.
func (s *Suite) killedClients(t *testing.T) {
	v := s.Boot(t)
	v.MustRun("cat /proc/version")
	var slowest time.Duration
	for i := range 50 {
		cmd := exec.Command(os.Args[0]) //nolint:gosec // itself
		cmd.Env = append(os.Environ(), envVictim+"="+v.PodEndpoint())
		out, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		_, err = io.ReadFull(out, make([]byte, 1)) // it is transferring
		require.NoError(t, err)
		time.Sleep(time.Duration(i%10) * time.Millisecond)
		require.NoError(t, cmd.Process.Kill())
		_ = cmd.Wait()

		began := time.Now()
		c, err := transport.Open(v.PodEndpoint())
		require.NoError(t, err)
		conn, err := c.Dial(Context(t), PortEcho)
		require.NoError(t, err)
		slowest = max(slowest, time.Since(began))
		msg := strings.Repeat("clean", 10_000)
		go func() { _, _ = io.WriteString(conn, msg) }()
		got := make([]byte, len(msg))
		_, err = io.ReadFull(conn, got)
		require.NoError(t, err)
		require.Equal(t, msg, string(got))
		require.NoError(t, conn.Close())
		require.NoError(t, c.Close())
	}
	t.Logf("the slowest new client was served after %v", slowest)
}

// victim transfers both ways without end.
func victim(endpoint string) {
	c, err := transport.Open(endpoint)
	if err != nil {
		panic(err)
	}
	ctx := context.Background()
	source, err := c.Dial(ctx, PortSource)
	if err != nil {
		panic(err)
	}
	sink, err := c.Dial(ctx, PortSink)
	if err != nil {
		panic(err)
	}
	go io.Copy(io.Discard, source) //nolint:errcheck
	for once := true; ; once = false {
		if _, err := sink.Write(make([]byte, 100_000)); err != nil {
			panic(err)
		}
		if once {
			fmt.Print("x")
		}
	}
}

// throughput measures the transport of a real VM, by the shim's way to it. By the other
// way, which containerd reads, a guest that sends without end is read slowly.
func (s *Suite) throughput(t *testing.T) {
	v := s.Boot(t)
	v.MustRun("cat /proc/version")
	pod, err := transport.Open(v.PodEndpoint())
	require.NoError(t, err)
	const size = 64 << 20
	source, err := pod.Dial(Context(t), PortSource)
	require.NoError(t, err)
	began := time.Now()
	_, err = io.CopyN(io.Discard, source, size)
	require.NoError(t, err)
	t.Logf("guest to host: %.0f MB/s", size/1e6/time.Since(began).Seconds())
	require.NoError(t, source.Close())

	sink, err := pod.Dial(Context(t), PortSink)
	require.NoError(t, err)
	began = time.Now()
	buf := make([]byte, 1<<20)
	for range size / len(buf) {
		_, err := sink.Write(buf)
		require.NoError(t, err)
	}
	t.Logf("host to guest: %.0f MB/s", size/1e6/time.Since(began).Seconds())
	require.NoError(t, pod.Close())

	began = time.Now()
	const dials = 50
	for range dials {
		var conn net.Conn
		conn, err = v.Dial(Context(t), PortEcho)
		require.NoError(t, err)
		require.NoError(t, conn.Close())
	}
	t.Logf("a dial takes %v", time.Since(began)/dials)
	s.paced(t, v)
}

// paced reads what has no end by containerd's way for a while.
func (s *Suite) paced(t *testing.T, v *VM) {
	t.Helper()
	source, err := v.Dial(Context(t), PortSource)
	require.NoError(t, err)
	const wait = 2 * time.Second
	require.NoError(t, source.SetReadDeadline(time.Now().Add(wait)))
	n, err := io.Copy(io.Discard, source)
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	require.Less(t, n, int64(6<<20))
	require.NoError(t, source.Close())
	conn, err := v.Dial(Context(t), PortEcho)
	require.NoError(t, err, "others are served meanwhile")
	require.NoError(t, conn.Close())
}
