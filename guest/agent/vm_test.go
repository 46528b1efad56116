// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cloudhv/containerd-cloudhv/guest/api"
	"github.com/cloudhv/containerd-cloudhv/guest/api/transport"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
	"github.com/cloudhv/containerd-cloudhv/guest/rootfs"
)

// vm is a real VM with this agent in it, by QEMU in software emulation; or, in
// ns_test.go, namespaces of this host that take its place.
type vm struct {
	t       *testing.T
	dir     string
	dial    func(ctx context.Context, port uint32) (net.Conn, error)
	machine guestv1.MachineService
	tasks   guestv1.TaskService

	// Of a real VM only.
	cmd    *exec.Cmd
	dead   chan struct{}
	client *transport.Client
}

// testMAC is the VM's network device.
const testMAC = "02:00:00:00:00:05"

// testImage is the serial of the disk with the containers' image.
const testImage = "test-image"

func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("needs %s: %v", name, err)
	}
	return path
}

func output(t *testing.T, name string, args ...string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	require.NoError(t, err, "%s %s: %s", name, args, out)
}

// build makes the guest's image with the agent as it is in the tree.
func build(t *testing.T, dir string) (kernel, image string) {
	t.Helper()
	if testing.Short() {
		t.Skip("boots a VM")
	}
	guest := filepath.Join("..", "..", "build", "guest")
	kernel, err := filepath.Abs(filepath.Join(guest, "vmlinux"))
	require.NoError(t, err)
	crun := filepath.Join(guest, "crun")
	for _, f := range []string{kernel, crun} {
		if _, err := os.Stat(f); err != nil {
			t.Skipf("needs the guest's kernel and crun: %v", err)
		}
	}
	agent := filepath.Join(dir, "agent")
	cmd := exec.CommandContext(t.Context(), tool(t, "go"), "build", "-trimpath", "-ldflags", "-s -w", "-o", agent, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	image = filepath.Join(dir, "root.erofs")
	_, size, err := rootfs.Create(image, rootfs.Inputs{Agent: agent, Runtime: crun})
	require.NoError(t, err)
	info, err := os.Stat(agent)
	require.NoError(t, err)
	t.Logf("agent %d bytes, image %d bytes", info.Size(), size)
	return kernel, image
}

// busyboxImage makes an erofs image with busybox in it.
func busyboxImage(t *testing.T, dir string) string {
	t.Helper()
	root := filepath.Join(dir, "busybox")
	for _, d := range []string{"bin", "etc", "tmp", "proc", "dev", "sys"} {
		require.NoError(t, os.MkdirAll(filepath.Join(root, d), 0o755))
	}
	b, err := os.ReadFile(tool(t, "busybox"))
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(root, "bin/busybox"), b, 0o755))
	for applet := range strings.FieldsSeq("sh cat echo sleep ls id hostname head dd md5sum stty ps kill mount grep true false env pwd test touch df seq wc nproc free date ip ping") {
		require.NoError(t, os.Link(filepath.Join(root, "bin/busybox"), filepath.Join(root, "bin", applet)))
	}
	require.NoError(t, os.WriteFile(filepath.Join(root, "etc/passwd"), []byte("root:x:0:0:root:/:/bin/sh\n"), 0o644))
	image := filepath.Join(dir, "busybox.erofs")
	output(t, tool(t, "mkfs.erofs"), image, root)
	return image
}

func scratchImage(t *testing.T, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "scratch.img")
	require.NoError(t, os.WriteFile(path, nil, 0o600))
	require.NoError(t, os.Truncate(path, 2<<30))
	output(t, tool(t, "mkfs.ext4"), "-q", "-E", "lazy_itable_init=1", path)
	return path
}

// boot starts a VM and returns when its agent has answered.
func bootVM(t *testing.T) *vm {
	t.Helper()
	qemu := tool(t, "qemu-system-x86_64")
	dir := t.TempDir()
	kernel, image := build(t, dir)
	v := &vm{t: t, dir: dir, dead: make(chan struct{})}
	args := []string{
		"-M", "q35", "-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "256M,slots=4,maxmem=4G",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-serial", "file:" + filepath.Join(dir, "console"),
		"-kernel", kernel,
		"-append", "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable memhp_default_state=online maxcpus=1 noreplace-smp lpj=5000000 root=/dev/vda rootfstype=erofs ro init=/init",
		"-device", "virtio-serial-pci",
		"-netdev", "hubport,id=net,hubid=0", "-device", "virtio-net-pci,netdev=net,mac=" + testMAC,
	}
	for _, d := range []struct{ file, serial, opts string }{
		{image, "root", ",readonly=on"}, {scratchImage(t, dir), "scratch", ""}, {busyboxImage(t, dir), testImage, ",readonly=on"},
	} {
		args = append(args, "-drive", "if=none,format=raw,id="+d.serial+",file="+d.file+d.opts,
			"-device", "virtio-blk-pci,drive="+d.serial+",serial="+d.serial)
	}
	args = append(args, plugArgs(dir)...)
	for _, p := range []string{transport.PortVM, transport.PortPod} {
		args = append(args, "-chardev", "socket,server=on,wait=off,id="+p+",path="+filepath.Join(dir, p),
			"-device", "virtserialport,chardev="+p+",name="+p)
	}
	v.cmd = exec.Command(qemu, args...)
	v.cmd.Stderr = os.Stderr
	began := time.Now()
	require.NoError(t, v.cmd.Start())
	go func() {
		_ = v.cmd.Wait()
		close(v.dead)
	}()
	t.Cleanup(v.stop)
	v.connect()
	info, err := v.machine.Info(v.ctx(), &guestv1.InfoRequest{})
	require.NoError(t, err)
	t.Logf("info after %v, %s of the VMM's CPU time: %v", time.Since(began).Round(time.Millisecond), v.cpuTime(), info)
	return v
}

func (v *vm) ctx() context.Context {
	ctx, cancel := context.WithTimeout(v.t.Context(), 2*time.Minute)
	v.t.Cleanup(cancel)
	return ctx
}

func (v *vm) connect() {
	socket := filepath.Join(v.dir, transport.PortVM)
	require.Eventually(v.t, func() bool { _, err := os.Stat(socket); return err == nil }, 30*time.Second, 5*time.Millisecond)
	client, err := transport.Open(transport.SerialEndpoint(socket))
	require.NoError(v.t, err)
	v.client, v.dial = client, client.Dial
	conn, err := v.dial(v.ctx(), api.PortRPC)
	require.NoError(v.t, err, "%s", v.console())
	rpc := ttrpc.NewClient(conn)
	v.machine, v.tasks = guestv1.NewMachineClient(rpc), guestv1.NewTaskClient(rpc)
}

// cpuTime is what the VMM has used, which says more than time on a busy machine.
func (v *vm) cpuTime() time.Duration {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", v.cmd.Process.Pid))
	require.NoError(v.t, err)
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+2:]))
	var user, system int64
	_, err = fmt.Sscan(f[11]+" "+f[12], &user, &system)
	require.NoError(v.t, err)
	return time.Duration(user+system) * 10 * time.Millisecond
}

func (v *vm) console() []byte {
	b, _ := os.ReadFile(filepath.Join(v.dir, "console"))
	return b
}

func (v *vm) stop() {
	if v.t.Failed() || testing.Verbose() {
		v.t.Logf("console:\n%s", v.console())
	}
	if v.client != nil {
		_ = v.client.Close()
	}
	_ = v.cmd.Process.Kill()
	<-v.dead
}

// stream opens a stdio stream and returns its ID.
func (v *vm) stream() (string, net.Conn) {
	v.t.Helper()
	var b [16]byte
	_, err := rand.Read(b[:])
	require.NoError(v.t, err)
	id := hex.EncodeToString(b[:])
	conn, err := v.dial(v.ctx(), api.PortStream)
	require.NoError(v.t, err)
	_, err = conn.Write([]byte(id + "\n"))
	require.NoError(v.t, err)
	var a [1]byte
	_, err = io.ReadFull(conn, a[:])
	require.NoError(v.t, err)
	require.EqualValues(v.t, api.StreamAccepted, a[0])
	v.t.Cleanup(func() { _ = conn.Close() })
	return id, conn
}

// podMAC is the pod's network device's.
const podMAC = "02:00:00:00:00:06"

func (v *vm) configureRequest() *guestv1.ConfigureRequest {
	entropy := make([]byte, 64)
	_, _ = rand.Read(entropy) // never fails
	return &guestv1.ConfigureRequest{
		PodId: "pod", Hostname: "web-0", ResolvConf: []byte("nameserver 10.0.0.10\n"), BuiltInMac: testMAC,
		Interfaces: []*guestv1.Interface{{
			Name: "eth0", Mac: podMAC, Mtu: 1400, Addresses: []string{"10.22.0.5/24", "fd00::5/64"},
			Neighbors: []*guestv1.Neighbor{{Address: "10.22.0.9", Mac: "02:00:00:00:00:09"}},
		}},
		Routes: []*guestv1.Route{
			{Device: "eth0", Destination: "10.22.0.0/24", Source: "10.22.0.5", Scope: 253, Protocol: 2, Family: 2},
			{Device: "eth0", Destination: "fd00::/64", Priority: 256, Protocol: 2, Family: 10},
			{Device: "eth0", Gateway: "10.22.0.1", Family: 2},
			{Device: "eth0", Gateway: "fd00::1", Family: 10},
			{Device: "eth0", Destination: "192.168.7.0/24", Gateway: "169.254.1.1", Family: 2},
			{Device: "eth0", Destination: "169.254.1.1/32", Scope: 253, Family: 2},
		},
		Clock: timestamppb.Now(), Entropy: entropy, Vcpus: 2, MachineId: strings.Repeat("0123456789abcdef", 2),
		Sysctls: map[string]string{"net.ipv4.ping_group_range": "0 2147483647"},
	}
}

func (v *vm) configure() {
	v.t.Helper()
	r := v.configureRequest()
	began := time.Now()
	resp, err := v.machine.Configure(v.ctx(), r)
	require.NoError(v.t, err)
	v.t.Logf("configure %v: %v", time.Since(began).Round(time.Millisecond), resp.GetSteps())
	_, err = v.machine.Configure(v.ctx(), r)
	require.NoError(v.t, err)
}

// spec is what CRI and the shim make of a plain container, shortened.
func testSpec(tty, script string) []byte {
	return fmt.Appendf(nil, `{"ociVersion":"1.1.0","process":%s,"root":{"path":"rootfs"},
	"mounts":[{"destination":"/proc","type":"proc","source":"proc","options":["nosuid","noexec","nodev"]},
	{"destination":"/dev","type":"tmpfs","source":"tmpfs","options":["nosuid","strictatime","mode=755","size=65536k"]},
	{"destination":"/dev/pts","type":"devpts","source":"devpts","options":["nosuid","noexec","newinstance","ptmxmode=0666","mode=0620","gid=5"]},
	{"destination":"/dev/mqueue","type":"mqueue","source":"mqueue","options":["nosuid","noexec","nodev"]},
	{"destination":"/sys","type":"sysfs","source":"sysfs","options":["nosuid","noexec","nodev","ro"]},
	{"destination":"/sys/fs/cgroup","type":"cgroup","source":"cgroup","options":["nosuid","noexec","nodev","relatime","ro"]}],
	"linux":{"resources":{"devices":[{"allow":false,"access":"rwm"}],"memory":{"limit":67108864},"cpu":{"shares":102,"quota":50000,"period":100000}},
	"namespaces":[{"type":"mount"},{"type":"cgroup"},{"type":"network"},{"type":"uts"},{"type":"ipc"},{"type":"pid"}],
	"maskedPaths":["/proc/kcore","/proc/keys","/sys/firmware"],"readonlyPaths":["/proc/bus","/proc/sys"]}}`, testProcess(tty, script))
}

func testProcess(tty, script string) string {
	caps := `["CAP_CHOWN","CAP_KILL","CAP_SETUID","CAP_SETGID","CAP_NET_BIND_SERVICE"]`
	return fmt.Sprintf(`{"terminal":%s,"user":{"uid":0,"gid":0},"args":["sh","-c",%q],"env":["PATH=/bin","A=b"],"cwd":"/",
	"capabilities":{"bounding":%[3]s,"effective":%[3]s,"permitted":%[3]s},"noNewPrivileges":true,"oomScoreAdj":100}`, tty, script, caps)
}

// withoutLimits is for hosts whose root may not lift RLIMIT_MEMLOCK, as crun does
// for a container's device rules, or that have no controllers.
func withoutLimits(spec []byte) []byte {
	var s map[string]json.RawMessage
	if json.Unmarshal(spec, &s) != nil {
		return spec // a test's wrong one
	}
	var l map[string]json.RawMessage
	if json.Unmarshal(s["linux"], &l) != nil || l == nil {
		return spec
	}
	delete(l, "resources")
	s["linux"], _ = json.Marshal(l)
	spec, _ = json.Marshal(s)
	return spec
}

func (v *vm) create(id, script string, change ...func(*guestv1.CreateRequest)) net.Conn {
	v.t.Helper()
	sid, conn := v.stream()
	r := &guestv1.CreateRequest{
		Id: id, Spec: testSpec("false", script), Rootfs: &guestv1.RootFS{ImageSerial: testImage},
		Stdio: &guestv1.Stdio{Stdout: sid},
	}
	for _, c := range change {
		c(r)
	}
	if v.cmd == nil {
		r.Spec = withoutLimits(r.Spec)
	}
	_, err := v.tasks.Create(v.ctx(), r)
	require.NoError(v.t, err)
	return conn
}

// run runs a container to its end and returns its output and status.
func (v *vm) run(id, script string, change ...func(*guestv1.CreateRequest)) (string, uint32) {
	v.t.Helper()
	conn := v.create(id, script, change...)
	_, err := v.tasks.Start(v.ctx(), &guestv1.StartRequest{Id: id})
	require.NoError(v.t, err)
	out, err := io.ReadAll(conn)
	require.NoError(v.t, err)
	w, err := v.tasks.Wait(v.ctx(), &guestv1.WaitRequest{Id: id})
	require.NoError(v.t, err)
	_, err = v.tasks.Delete(v.ctx(), &guestv1.DeleteRequest{Id: id})
	require.NoError(v.t, err)
	return string(out), w.GetExitStatus()
}
