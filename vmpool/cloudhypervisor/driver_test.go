// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package cloudhypervisor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmmtest"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmmtest/realvm"
)

func addDisk(ctx context.Context, vm vmm.VM, serial string) error {
	_, err := vm.AddDisk(ctx, vmm.Disk{Serial: serial, Path: "/proc/self/exe"})
	return err
}

// Towards the fake the driver keeps the contract, on any host.
func TestKeepsTheContractTowardsAFake(t *testing.T) {
	vmmtest.Run(t, vmmtest.Suite{
		Driver: fakeDriver(t, fakeSound), EchoPort: realvm.PortEcho, Limit: 20 * time.Second,
		Config: fakeConfig, TAP: func(t *testing.T) []*os.File { return realvm.TAP(t, 1) },
	})
}

// bootFake boots one that ends with the test, and leaves nothing.
func bootFake(t *testing.T) *machine {
	t.Helper()
	cfg := fakeConfig(t)
	vm, err := fakeDriver(t, fakeSound).Boot(realvm.Context(t), cfg)
	require.NoError(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		assert.NoError(t, errors.Join(vm.Kill(ctx), vm.Close()))
		assertLogsOnly(t, cfg.Dir)
	})
	return vm.(*machine)
}

func assertLogsOnly(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	for _, e := range entries {
		assert.Contains(t, []string{vmm.ConsoleLog, vmm.VMMLog}, e.Name())
	}
}

func short(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	t.Cleanup(cancel)
	return ctx
}

// calls are one of each kind.
func calls(vm *machine) map[string]func(context.Context) error {
	return map[string]func(context.Context) error{
		"pause":       vm.Pause,
		"resume":      vm.Resume,
		"add NIC":     func(ctx context.Context) error { return addNIC(ctx, vm) },
		"remove NIC":  func(ctx context.Context) error { return vm.RemoveNIC(ctx, "n") },
		"add disk":    func(ctx context.Context) error { return addDisk(ctx, vm, "a") },
		"remove disk": func(ctx context.Context) error { return vm.RemoveDisk(ctx, "b") },
		"resize": func(ctx context.Context) error {
			return vm.Resize(ctx, vmm.Size{VCPUs: 2, MemoryBytes: 256 << 20})
		},
	}
}

// addNIC adds one on what is no TAP, which a fake does not mind.
func addNIC(ctx context.Context, vm *machine) error {
	queue, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer queue.Close()
	return vm.AddNIC(ctx, vmm.NIC{ID: "n", MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, Queues: []*os.File{queue}})
}

// A hypervisor that has gone wrong costs each call an error that says what is wrong,
// within the caller's time.
func TestHypervisorsThatGoWrong(t *testing.T) {
	for name, tc := range map[string]struct {
		answer string
		is     error
		want   string
	}{
		"answers 500":     {answer500, errdefs.ErrUnknown, "Error from API: The VM is upset (500 Internal Server Error)"},
		"answers garbage": {answerGarbage, errdefs.ErrUnknown, "unexpected answer"},
		"never answers":   {answerNever, context.DeadlineExceeded, "cloud-hypervisor: vm."},
		"hangs up":        {answerEnd, errdefs.ErrUnavailable, "connection lost"},
	} {
		t.Run(name, func(t *testing.T) {
			for call := range calls(nil) {
				t.Run(call, func(t *testing.T) {
					vm := bootFake(t)
					require.NoError(t, os.WriteFile(filepath.Join(vm.dir, ownDir, answerFile), []byte(tc.answer), 0o600))
					defer os.Remove(filepath.Join(vm.dir, ownDir, answerFile)) //nolint:errcheck // or the VM's end has
					ctx := realvm.Context(t)
					if tc.answer == answerNever {
						ctx = short(t)
					}
					began := time.Now()
					err := calls(vm)[call](ctx)
					require.ErrorIs(t, err, tc.is)
					assert.ErrorContains(t, err, tc.want)
					assert.Less(t, time.Since(began), 5*time.Second)
				})
			}
		})
	}
}

// A change of vCPUs waits for the guest, and not for what the hypervisor refuses.
func TestVCPUsThatAreRefused(t *testing.T) {
	vm := bootFake(t)
	began := time.Now()
	err := vm.Resize(realvm.Context(t), vmm.Size{VCPUs: refusedVCPUs, MemoryBytes: 128 << 20})
	require.ErrorContains(t, err, "to 3 vCPUs: cloud-hypervisor: vm.resize: Error from API: Error from CPU manager: Cannot create a vCPU")
	require.Less(t, time.Since(began), cpuLimit/2)
	require.NoError(t, vm.Resize(realvm.Context(t), vmm.Size{VCPUs: pendingUntil, MemoryBytes: 128 << 20}))
}

// A frozen one holds up nobody for longer than he wants, can be killed, and goes on
// when it thaws.
func TestFrozen(t *testing.T) {
	vm := bootFake(t)
	freeze(t, vm.Pid())
	for name, call := range calls(vm) {
		require.ErrorIs(t, call(short(t)), context.DeadlineExceeded, name)
	}
	_, err := fakeDriver(t, fakeSound).Attach(short(t), vm.State())
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.NoError(t, unix.Kill(vm.Pid(), unix.SIGCONT))
	// The disk may have come after all; who plugs it in again gets it.
	require.NoError(t, addDisk(realvm.Context(t), vm, "a"))
	require.ErrorIs(t, addDisk(realvm.Context(t), vm, "a"), errdefs.ErrAlreadyExists)
	require.NoError(t, unix.Kill(vm.Pid(), unix.SIGSTOP))
}

// freeze stops a process, and waits until it has stopped.
func freeze(t *testing.T, pid int) {
	t.Helper()
	require.NoError(t, unix.Kill(pid, unix.SIGSTOP))
	require.Eventually(t, func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err == nil && strings.Contains(string(stat), ") T ")
	}, 10*time.Second, time.Millisecond)
}

// Without its API's socket a VM cannot be controlled, but ended.
func TestSocketGone(t *testing.T) {
	vm := bootFake(t)
	require.NoError(t, os.Remove(vm.Path(apiSocket)))
	for name, call := range calls(vm) {
		err := call(realvm.Context(t))
		require.ErrorIs(t, err, errdefs.ErrUnavailable, name)
		require.ErrorContains(t, err, apiSocket, name)
	}
	_, err := fakeDriver(t, fakeSound).Attach(realvm.Context(t), vm.State())
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
}

// What cannot be started leaves nothing, and the error has the hypervisor's words.
func TestStartsThatFail(t *testing.T) {
	for name, tc := range map[string]struct {
		how  string
		is   error
		want string
	}{
		"it ends":          {fakeBroken, errdefs.ErrUnavailable, "exited with code 1: \"Error booting VM: the fake is broken\""},
		"it says nothing":  {fakeSilent, context.DeadlineExceeded, "start"},
		"it is no program": {"", errdefs.ErrFailedPrecondition, "exec"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := fakeConfig(t)
			cfg.CgroupPath = fmt.Sprintf("/chv-fake-%d", os.Getpid())
			d := fakeDriver(t, tc.how)
			if tc.how == "" {
				require.NoError(t, os.WriteFile(d.binary, []byte("\x7fELF nothing"), 0o700)) //nolint:gosec // it is run
			}
			ctx := realvm.Context(t)
			if tc.how == fakeSilent {
				_, err := d.Probe(ctx)
				require.NoError(t, err)
				ctx = short(t)
			}
			_, err := d.Boot(ctx, cfg)
			require.ErrorIs(t, err, tc.is)
			require.ErrorContains(t, err, tc.want)
			assertLogsOnly(t, cfg.Dir)
			assert.False(t, vmm.OpenCgroup(cfg.CgroupPath).Exists(), "its cgroup")
		})
	}
}

// A device that appears after its call was given up does not stand in the way.
func TestALateDevice(t *testing.T) {
	vm := bootFake(t)
	answer := filepath.Join(vm.dir, ownDir, answerFile)
	require.NoError(t, os.WriteFile(answer, []byte(answerNever), 0o600))
	require.ErrorIs(t, addDisk(short(t), vm, "late"), context.DeadlineExceeded)
	require.NoError(t, os.Remove(answer))
	// It was plugged in all the same.
	require.NoError(t, vm.put(realvm.Context(t), "vm.add-disk", diskConfig{ID: diskPrefix + "late"}))
	require.NoError(t, addDisk(realvm.Context(t), vm, "late"))
	require.NoError(t, vm.RemoveDisk(realvm.Context(t), "late"))
}

// A device that the guest still sets up is not asked for, as the hypervisor would stand still.
func TestRemoveAtOnce(t *testing.T) {
	vm := bootFake(t)
	for range 2 {
		require.NoError(t, addDisk(realvm.Context(t), vm, "slow"))
		require.NoError(t, vm.RemoveDisk(realvm.Context(t), "slow"))
	}
	require.Empty(t, vm.fresh)
}

func TestRestoreRefusesOthers(t *testing.T) {
	t.Parallel()
	for _, from := range []vmm.Snapshot{{Driver: "qemu"}, {Driver: Name}, {Driver: Name, Layout: "another"}} {
		_, err := New("").Restore(t.Context(), vmm.Config{}, from)
		require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	}
	_, err := New("").Restore(t.Context(), vmm.Config{}, vmm.Snapshot{Driver: Name, Layout: layout, BuiltInNIC: true})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.ErrorContains(t, err, "network device")
}

func TestVersions(t *testing.T) {
	t.Parallel()
	for out, want := range map[string]string{
		"cloud-hypervisor v53.0\n":                              "53.0",
		"cloud-hypervisor v53.0.0\nMigration Protocol Versions": "53.0.0",
		"cloud-hypervisor v54.1-12-gdeadbeef\n":                 "54.1-12-gdeadbeef",
	} {
		got, err := parseVersion(out)
		require.NoError(t, err)
		assert.Equal(t, want, got)
	}
	for out, want := range map[string]string{
		"cloud-hypervisor v52.0\n":    "version 52.0 is too old, want 53 or later",
		"cloud-hypervisor v9.0":       "too old",
		"QEMU emulator version 7.2.0": `"QEMU emulator version 7.2.0"`,
		"":                            "want Cloud Hypervisor's version",
		strings.Repeat("cloud-hypervisor? ", 1000): "want Cloud Hypervisor's version",
	} {
		_, err := parseVersion(out)
		require.ErrorContains(t, err, want)
		require.Less(t, len(err.Error()), 300)
	}
}

// Each thing that is missing is named, all at once.
func TestProbe(t *testing.T) {
	t.Parallel()
	none := fmt.Errorf("there is no /dev/kvm: %w", fs.ErrNotExist)
	noMSHV := errors.New("there is no /dev/mshv")
	ok := func() error { return nil }
	fail := func(err error) func() error { return func() error { return err } }
	for name, tc := range map[string]struct {
		kvm, mshv func() error
		want      string
		wrong     []string
	}{
		"KVM":               {ok, ok, vmm.AccelKVM, nil},
		"MSHV":              {fail(none), ok, vmm.AccelMSHV, nil},
		"neither":           {fail(none), fail(noMSHV), "", []string{"/dev/kvm", "/dev/mshv"}},
		"KVM is no use":     {fail(errors.New("paravirtual")), ok, "", []string{"paravirtual", "would not look at /dev/mshv"}},
		"neither is of use": {fail(errors.New("paravirtual")), fail(noMSHV), "", []string{"paravirtual", "/dev/mshv"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, reason, err := accelerator(tc.kvm, tc.mshv)
			if tc.want != "" {
				require.NoError(t, err)
				assert.Equal(t, tc.want, got)
				assert.NotEmpty(t, reason)
				return
			}
			for _, w := range tc.wrong {
				require.ErrorContains(t, err, w)
			}
		})
	}
	d := New("/nonexistent/cloud-hypervisor")
	d.accelerator = func() (string, string, error) { return "", "", none }
	_, err := d.Probe(t.Context())
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	require.ErrorContains(t, err, "/nonexistent/cloud-hypervisor")
	require.ErrorContains(t, err, "there is no /dev/kvm")

	for binary, want := range map[string]string{"true": "want Cloud Hypervisor's version", "false": "exit status 1", hangs(t): "no answer within"} {
		d = New(binary)
		d.accelerator = func() (string, string, error) { return vmm.AccelKVM, "", nil }
		_, err = d.Probe(t.Context())
		require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
		require.ErrorContains(t, err, want)
	}
}

// hangs is a program that does.
func hangs(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "hangs")
	require.NoError(t, os.WriteFile(path, []byte("#!/bin/sh\nexec sleep 1000\n"), 0o700)) //nolint:gosec // it is run
	return path
}

// Events are found in their stream, whatever came before and between.
func TestEvents(t *testing.T) {
	t.Parallel()
	booted := "{\n  \"timestamp\": {},\n  \"source\": \"vm\",\n  \"event\": \"booted\",\n  \"properties\": null\n}\n\n"
	removed := "{\n  \"source\": \"vm\",\n  \"event\": \"device-removed\",\n  \"properties\": {\n    \"id\": \"disk-a\",\n    \"bdf\": \"0000:00:06.0\"\n  }\n}\n\n"
	for name, text := range map[string]string{
		"clean":             booted + removed,
		"the rest of one":   "e\": \"vm\",\n  \"event\": \"x\"\n}\n\n" + booted + removed,
		"garbage":           "hello\n{\n}\n}\n" + booted + "\x00\x01\n" + removed,
		"one without end":   "{\n" + strings.Repeat("  \"x\": 1,\n", 5000) + booted + removed,
		"one that is wrong": "{\n  \"source\": 7\n}\n" + booted + removed,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var e events
			runs, stop := e.expect(isStart(false))
			defer stop()
			gone, stopGone := e.expect(func(e event) bool { return e.Name == eventRemoved })
			defer stopGone()
			e.read(strings.NewReader(text))
			require.Len(t, runs, 1)
			require.Equal(t, "disk-a", (<-gone).Properties[propertyID])
		})
	}
}

func TestCommandLine(t *testing.T) {
	t.Parallel()
	cfg := vmm.Config{
		Dir: "/run/vm", Size: vmm.Size{VCPUs: 2, MemoryBytes: 128 << 20}, Max: vmm.Size{VCPUs: 4, MemoryBytes: 1 << 30},
		MemoryFile: "/templates/x/memory", Scratch: "/scratch", KernelParams: []string{"a=b"}, TAP: os.Stdin,
	}
	line := strings.Join(commandLine(cfg, nil), " ")
	for _, want := range []string{
		"--cpus boot=2,max=4", "--memory size=0,hotplug_method=virtio-mem,thp=off",
		"--memory-zone id=ram,size=128M,shared=on,file=snap/memory,hotplug_size=896M",
		"path=scratch,id=scratch,serial=scratch,image_type=raw", "--net fd=[5],id=builtin,mac=" + vmm.BuiltInMAC, " a=b ", "--kernel /run/vm/own/kernel",
	} {
		assert.Contains(t, line, want)
	}
	assert.NotContains(t, line, "/templates", "a clone has other paths")
	line = strings.Join(commandLine(cfg, &vmm.Snapshot{}), " ")
	assert.Contains(t, line, "--restore source_url=file:///run/vm/own/snap,memory_restore_mode=copy,resume=true,net_fds=[builtin@[5]]")
	assert.NotContains(t, line, "--kernel")
}

func TestUnshare(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), configName)
	require.NoError(t, os.WriteFile(path, []byte(`{"big":18446744073709551615,"memory":{"thp":false,"zones":[{"id":"ram","shared":true}]},"payload":{"kernel":"/x/kernel"}}`), 0o600))
	require.NoError(t, editConfig(path))
	got, err := os.ReadFile(path)
	require.NoError(t, err)
	assert.JSONEq(t, `{"big":18446744073709551615,"memory":{"thp":false,"zones":[{"id":"ram","shared":false}]},"payload":{"kernel":"kernel"}}`, string(got))
	assert.Contains(t, string(got), "18446744073709551615")
	require.ErrorIs(t, editConfig(path), errdefs.ErrInternal, "it is not shared")
	for _, wrong := range []string{`{}`, `{"memory":{}}`, `{"memory":{"thp":true,"zones":[{"shared":true}]}}`, `{"memory":{"thp":false,"zones":[]}}`} {
		require.NoError(t, os.WriteFile(path, []byte(wrong), 0o600))
		require.Error(t, editConfig(path), wrong)
	}
}

// Whatever comes in the stream of events, it is read to its end.
func FuzzEvents(f *testing.F) {
	f.Add("{\n  \"source\": \"vm\",\n  \"event\": \"booted\"\n}\n\n")
	f.Add("}\n{\n")
	f.Fuzz(func(t *testing.T, text string) {
		var e events
		_, stop := e.expect(isStart(false))
		defer stop()
		e.read(strings.NewReader(text))
	})
}

// Whatever is answered is a result or an error.
func FuzzAnswers(f *testing.F) {
	f.Add("HTTP/1.1 204 No Content\r\n\r\n")
	f.Add("HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{\"state\": \"Running\"}")
	f.Add("HTTP/1.1 500 Internal Server Error\r\nContent-Length: 9\r\n\r\n[\"upset\"]")
	f.Fuzz(func(t *testing.T, text string) {
		var info vmInfo
		if err := decode(strings.NewReader(text), "vm.info", &info); err != nil && err.Error() == "" {
			t.Error("an error without words")
		}
	})
}
