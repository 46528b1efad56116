// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm/vmmtest"
)

// Ports of testdata/init.
const (
	portEcho   = 1
	portSource = 2
	portSink   = 3
	portRun    = 4
)

// limit bounds a step of a test. VMs may be emulated, on a busy host.
const limit = 2 * time.Minute

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// kernel is where the build puts the guest kernel.
const kernel = "../../build/guest/vmlinux"

// image is the root file system whose init is testdata/init, built once.
var image = sync.OnceValues(buildImage)

// imageDir holds what buildImage made; it is removed by the last test that used it.
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
	build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", filepath.Join(root, "init"), "./testdata/init")
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

// need skips a test where real VMs cannot run, and says why.
func need(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("boots VMs")
	}
	if _, err := os.Stat(kernel); errors.Is(err, fs.ErrNotExist) {
		t.Skipf("no guest kernel at %s", kernel)
	}
	for _, binary := range []string{DefaultBinary, "mkfs.erofs"} {
		if _, err := exec.LookPath(binary); err != nil {
			t.Skipf("%s is not installed", binary)
		}
	}
}

// config is a valid configuration of a VM with the test's init.
func config(t testing.TB) vmm.Config {
	t.Helper()
	need(t)
	img, err := image()
	require.NoError(t, err)
	kern, err := filepath.Abs(kernel)
	require.NoError(t, err)
	dir, err := os.MkdirTemp("", "vm")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	files := filepath.Join(dir, "..", filepath.Base(dir)+"-files")
	require.NoError(t, os.Mkdir(files, 0o700))
	t.Cleanup(func() { _ = os.RemoveAll(files) })
	rootfs, scratch := filepath.Join(files, "rootfs"), filepath.Join(files, "scratch")
	require.NoError(t, os.WriteFile(rootfs, img, 0o600))
	require.NoError(t, os.WriteFile(scratch, nil, 0o600))
	require.NoError(t, os.Truncate(scratch, 64<<20))
	return vmm.Config{
		ID: filepath.Base(dir), Dir: dir, Kernel: kern, RootFS: rootfs, Scratch: scratch, ConsoleLimit: 64 << 10,
		Size: vmm.Size{VCPUs: 1, MemoryBytes: 128 << 20}, Max: vmm.Size{VCPUs: 2, MemoryBytes: 1 << 30},
	}
}

// testVM is a VM with the test's init.
type testVM struct {
	vmm.VM
	t   testing.TB
	cfg vmm.Config
}

func boot(t testing.TB, change ...func(*vmm.Config)) *testVM {
	t.Helper()
	cfg := config(t)
	for _, f := range change {
		f(&cfg)
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	vm, err := New("").Boot(ctx, cfg)
	require.NoError(t, err)
	v := &testVM{VM: vm, t: t, cfg: cfg}
	t.Cleanup(v.end)
	return v
}

func (v *testVM) end() {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if err := errors.Join(v.Kill(ctx), v.Close()); err != nil {
		v.t.Errorf("end VM: %v", err)
	}
	if v.t.Failed() {
		for _, name := range []string{vmm.ConsoleLog, vmm.VMMLog} {
			v.t.Logf("%s: %s", name, vmm.Tail(filepath.Join(v.cfg.Dir, name), 4<<10))
		}
		v.t.Logf("exit: %+v", v.Exit())
	}
}

// run runs a command of testdata/init and returns what it answers.
func (v *testVM) run(line string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	conn, err := v.Dial(ctx, portRun)
	if err != nil {
		return "", err
	}
	defer conn.Close() //nolint:errcheck
	if err := conn.SetDeadline(time.Now().Add(limit)); err != nil {
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

func (v *testVM) mustRun(line string) string {
	v.t.Helper()
	out, err := v.run(line)
	require.NoError(v.t, err)
	return out
}

// eventually asks the guest until an answer will do.
func (v *testVM) eventually(line string, want func(string) bool) string {
	v.t.Helper()
	for end := time.Now().Add(limit); ; time.Sleep(5 * time.Millisecond) {
		out, err := v.run(line)
		if err == nil && want(out) {
			return out
		}
		if time.Now().After(end) {
			v.t.Fatalf("%s: %q, %v", line, out, err)
		}
	}
}

// tap makes a TAP device that goes with its files.
func tap(t *testing.T, queues int) []*os.File {
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
	t.Cleanup(func() { closeAll(files) })
	return files
}

func TestKeepsTheContract(t *testing.T) {
	need(t)
	vmmtest.Run(t, vmmtest.Suite{
		Driver: New(""), EchoPort: portEcho, Limit: limit,
		Config: func(t *testing.T) vmm.Config { return config(t) },
		TAP:    func(t *testing.T) []*os.File { return tap(t, 1) },
	})
}
