// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package realvm holds tests of drivers that run real VMs, with the guest kernel and
// an init of their own. Every driver passes them.
package realvm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/vmpool/confine"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmmtest"
)

// Ports of the package init.
const (
	PortEcho   = 1
	PortSource = 2
	PortSink   = 3
	PortRun    = 4
)

// Limit bounds a step of a test. VMs may be emulated, on a busy host: E2E_TIME_FACTOR stretches it.
var Limit = scaled(2 * time.Minute)

func scaled(d time.Duration) time.Duration {
	f, err := strconv.ParseFloat(os.Getenv("E2E_TIME_FACTOR"), 64)
	if err != nil || f <= 0 {
		return d
	}
	return time.Duration(float64(d) * f)
}

// envImage names a file with the image of the init, for a host without a compiler.
const envImage = "REALVM_IMAGE"

// envVictim makes the test's program the victim of the test of killed clients.
const envVictim = "REALVM_VICTIM"

// Suite is what Run needs to know of a driver.
type Suite struct {
	Driver vmm.Driver
	// Missing says why VMs cannot run here; it is nil or returns nil if they can.
	Missing func() error
	// StateFile is the file of a snapshot that must be whole.
	StateFile string
	// PlugsVCPUs tells that Resize plugs vCPUs; else all are there from the start.
	PlugsVCPUs bool
	// LateHotPlug tells that hot-plug wants a guest that has started.
	LateHotPlug bool
	// LateConsole tells that the end of much console output comes with the next.
	LateConsole bool
	// ImageDisk tells that a machine has the disk for an image from its start.
	ImageDisk bool
}

// Main runs a package's tests. Its TestMain calls it.
func Main(m *testing.M) {
	if endpoint := os.Getenv(envVictim); endpoint != "" {
		victim(endpoint)
	}
	goleak.VerifyTestMain(m)
}

// Run runs all tests.
func (s *Suite) Run(t *testing.T) {
	s.Need(t)
	t.Run("keeps the contract", func(t *testing.T) {
		vmmtest.Run(t, vmmtest.Suite{
			Driver: s.Driver, EchoPort: PortEcho, Limit: Limit,
			Config: func(t *testing.T) vmm.Config { return s.Config(t) },
			TAP:    func(t *testing.T) []*os.File { return TAP(t, 1) },
		})
	})
	for _, test := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"how VMs end", s.howVMsEnd},
		{"boot failure", s.bootFailure},
		{"cgroup", s.cgroup},
		{"kill noticed", s.killNoticed},
		{"stuck guest", s.stuckGuest},
		{"console", s.console},
		{"idle guest", s.idleGuest},
		{"disks", s.disks},
		{"early hot-plug", s.earlyHotplug},
		{"NICs", s.nics},
		{"memory", s.memory},
		{"vCPUs", s.vCPUs},
		{"restore", s.restore},
		{"restore refuses", s.restoreRefuses},
		{"killed clients", s.killedClients},
		{"throughput", s.throughput},
		{"twenty at once", s.twentyAtOnce},
	} {
		t.Run(test.name, test.run)
	}
}

// build is the directory of what is built, found from the package that is tested.
func build() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return filepath.Join(dir, "build"), nil
		}
	}
	return "", errors.New("there is no go.mod above the test's directory")
}

// kernel is where the build puts the guest kernel.
func kernel() (string, error) {
	dir, err := build()
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "guest", "vmlinux")
	_, err = os.Stat(path)
	return path, err
}

// image is the root file system with the package init, built once.
var image = sync.OnceValues(func() ([]byte, error) {
	if path := os.Getenv(envImage); path != "" {
		return os.ReadFile(path)
	}
	return buildImage()
})

func buildImage() (_ []byte, retErr error) {
	dir, err := os.MkdirTemp("", "image")
	if err != nil {
		return nil, err
	}
	defer func() { retErr = errors.Join(retErr, os.RemoveAll(dir)) }()
	root := filepath.Join(dir, "root")
	for _, d := range []string{"dev", "proc", "sys", "tmp"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			return nil, err
		}
	}
	build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", filepath.Join(root, "init"),
		"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmmtest/realvm/init")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build init: %w: %s", err, out)
	}
	img := filepath.Join(dir, "image")
	if out, err := exec.Command("mkfs.erofs", img, root).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("mkfs.erofs: %w: %s", err, out)
	}
	return os.ReadFile(img)
}

// Need skips a test where real VMs cannot run, and says why; with E2E_REQUIRE=1 that is a failure. It says
// what they run on, and fails if that is not E2E_ACCELERATOR.
func (s *Suite) Need(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("boots VMs")
	}
	if err := s.lacks(); err != nil {
		Lacks(t, err)
	}
	probe.Do(func() {
		host, hostErr = s.Driver.Probe(Context(t))
		fmt.Fprintf(os.Stderr, "hypervisor: %s %s, accelerator %s\n", host.Driver, host.Version, host.Accelerator)
	})
	require.NoError(t, hostErr)
	if want := os.Getenv("E2E_ACCELERATOR"); want != "" && want != host.Accelerator {
		t.Fatalf("the hypervisor runs with %s (%s), want %s", host.Accelerator, host.Reason, want)
	}
}

// host is what the driver's hypervisor is here, probed once: a program tests one driver.
var (
	probe   sync.Once
	host    vmm.Host
	hostErr error
)

// Lacks skips a test for what the host lacks; with E2E_REQUIRE=1 it fails.
func Lacks(t testing.TB, what any) {
	t.Helper()
	if os.Getenv("E2E_REQUIRE") == "1" {
		t.Fatal(what)
	}
	t.Skip(what)
}

// lacks is what the host lacks for real VMs.
func (s *Suite) lacks() error {
	if path, err := kernel(); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("no guest kernel at %s: %w", path, err)
	}
	if _, err := exec.LookPath("mkfs.erofs"); err != nil && os.Getenv(envImage) == "" {
		return fmt.Errorf("mkfs.erofs is not installed: %w", err)
	}
	if s.Missing != nil {
		return s.Missing()
	}
	return nil
}

// firstUser is where the users begin that VMMs have here.
const firstUser = 1879048192 + 7000

// users counts them.
var users atomic.Uint32

// user is one of its own for a VMM, where they can be confined; else it is 0.
func user() uint32 {
	if confine.Need() != nil {
		return 0
	}
	return firstUser + users.Add(1)
}

// Dir is a directory of the test's own that VMMs can go through, as they are no root.
func Dir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "dir")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o711)) //nolint:gosec // as those of a node
	return dir
}

// Config is a valid configuration of a VM with the package init.
func (s *Suite) Config(t testing.TB) vmm.Config {
	t.Helper()
	s.Need(t)
	img, err := image()
	require.NoError(t, err)
	kern, err := kernel()
	require.NoError(t, err)
	dir, err := os.MkdirTemp("", "vm")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	files := filepath.Join(dir, "..", filepath.Base(dir)+"-files")
	require.NoError(t, os.Mkdir(files, 0o711)) //nolint:gosec // as that of a node
	t.Cleanup(func() { _ = os.RemoveAll(files) })
	rootfs, scratch := filepath.Join(files, "rootfs"), filepath.Join(files, "scratch")
	require.NoError(t, os.WriteFile(rootfs, img, 0o644))
	require.NoError(t, os.WriteFile(scratch, nil, 0o600))
	require.NoError(t, os.Truncate(scratch, 64<<20))
	return vmm.Config{
		UID: user(),
		ID:  filepath.Base(dir), Dir: dir, Kernel: kern, RootFS: rootfs, Scratch: scratch, ConsoleLimit: 64 << 10,
		Size: vmm.Size{VCPUs: 1, MemoryBytes: 128 << 20}, Max: vmm.Size{VCPUs: 2, MemoryBytes: 1<<30 + 3*vmm.MemoryUnit},
	}
}

// VM is a VM with the package init.
type VM struct {
	vmm.VM
	// Cfg is what it was started with.
	Cfg vmm.Config
	t   testing.TB
}

// Boot boots a VM that ends with the test.
func (s *Suite) Boot(t testing.TB, change ...func(*vmm.Config)) *VM {
	t.Helper()
	cfg := s.Config(t)
	for _, f := range change {
		f(&cfg)
	}
	ctx, cancel := context.WithTimeout(context.Background(), Limit)
	defer cancel()
	vm, err := s.Driver.Boot(ctx, cfg)
	require.NoError(t, err)
	return Take(t, vm, cfg)
}

// Take makes a VM end with the test.
func Take(t testing.TB, vm vmm.VM, cfg vmm.Config) *VM {
	v := &VM{VM: vm, t: t, Cfg: cfg}
	t.Cleanup(v.End)
	return v
}

// End ends the VM, and shows what it printed if the test has failed.
func (v *VM) End() {
	ctx, cancel := context.WithTimeout(context.Background(), Limit)
	defer cancel()
	if err := errors.Join(v.Kill(ctx), v.Close()); err != nil {
		v.t.Errorf("end VM: %v", err)
	}
	if v.t.Failed() {
		for _, name := range []string{vmm.ConsoleLog, vmm.VMMLog} {
			v.t.Logf("%s: %s", name, vmm.Tail(filepath.Join(v.Cfg.Dir, name), 4<<10))
		}
		v.t.Logf("exit: %+v", v.Exit())
	}
}

// Run runs a command of the package init and returns what it answers.
func (v *VM) Run(line string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), Limit)
	defer cancel()
	conn, err := v.Dial(ctx, PortRun)
	if err != nil {
		return "", err
	}
	defer conn.Close() //nolint:errcheck
	if err := conn.SetDeadline(time.Now().Add(Limit)); err != nil {
		return "", err
	}
	if _, err := fmt.Fprintln(conn, line); err != nil {
		return "", err
	}
	answer, err := io.ReadAll(conn)
	if err != nil {
		return "", err
	}
	out, ok := strings.CutPrefix(string(answer), "ok ")
	if !ok {
		return "", fmt.Errorf("%s: %s", line, answer)
	}
	return out, nil
}

// MustRun is Run without an error.
func (v *VM) MustRun(line string) string {
	v.t.Helper()
	out, err := v.Run(line)
	require.NoError(v.t, err)
	return out
}

// Eventually asks the guest until an answer will do.
func (v *VM) Eventually(line string, want func(string) bool) string {
	v.t.Helper()
	for end := time.Now().Add(Limit); ; time.Sleep(5 * time.Millisecond) {
		out, err := v.Run(line)
		if err == nil && want(out) {
			return out
		}
		if time.Now().After(end) {
			v.t.Fatalf("%s: %q, %v", line, out, err)
		}
	}
}

// TAP makes a TAP device that goes with its files.
func TAP(t *testing.T, queues int) []*os.File {
	t.Helper()
	name := fmt.Sprintf("chvt%d", os.Getpid()%100000)
	var files []*os.File
	for range queues {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Skipf("no TAP devices: %v", err)
		}
		req, err := unix.NewIfreq(name)
		require.NoError(t, err)
		flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		if queues > 1 {
			flags |= unix.IFF_MULTI_QUEUE
		}
		req.SetUint16(flags)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
			_ = unix.Close(fd)
			t.Skipf("no TAP device: %v", err)
		}
		files = append(files, os.NewFile(uintptr(fd), name))
	}
	t.Cleanup(func() {
		for _, f := range files {
			_ = f.Close()
		}
	})
	return files
}
