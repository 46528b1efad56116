// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/containerd/ttrpc"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/cgroup"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/crun"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/disk"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/machine"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/podns"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/reap"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/rootfs"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/rpc"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/stdio"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/task"
	"github.com/cloudhv/containerd-cloudhv/guest/api"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// inNamespaces is set in the test's own child.
const inNamespaces = "AGENT_TEST_NAMESPACES"

// TestTasks runs the Task service, with the host's crun, in namespaces of its
// own: as PID 1, with its own mounts and cgroups. That is quicker than a VM, and
// works with the race detector.
func TestTasks(t *testing.T) {
	if os.Getenv(inNamespaces) != "" {
		insideNamespaces(t)
		return
	}
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	tool(t, "crun")
	unified := "/sys/fs/cgroup/unified"
	if _, err := os.Stat(filepath.Join(unified, "cgroup.procs")); err != nil {
		unified = "/sys/fs/cgroup"
	}
	if _, err := os.Stat(filepath.Join(unified, "cgroup.kill")); err != nil {
		// The root has no cgroup.kill, so ask for what every version 2 root has.
		if _, err := os.Stat(filepath.Join(unified, "cgroup.subtree_control")); err != nil {
			t.Skipf("needs cgroup v2: %v", err)
		}
	}
	group := filepath.Join(unified, fmt.Sprintf("agent-test-%d", os.Getpid()))
	require.NoError(t, os.Mkdir(group, 0o755))
	t.Cleanup(func() { require.NoError(t, cgroup.Group(group).Remove(context.Background())) })
	dir, err := os.Open(group)
	require.NoError(t, err)
	defer dir.Close()
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.CommandContext(t.Context(), self, "-test.run=^TestTasks$", "-test.v="+fmt.Sprint(testing.Verbose()), "-test.timeout=5m")
	cmd.Env = append(os.Environ(), inNamespaces+"="+busyboxImage(t, t.TempDir()))
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWNET,
		UseCgroupFD: true, CgroupFD: int(dir.Fd()), Pdeathsig: unix.SIGKILL,
	}
	out, err := cmd.CombinedOutput()
	if testing.Verbose() || err != nil {
		t.Logf("%s", out)
	}
	require.NoError(t, err)
}

// insideNamespaces is PID 1 of the test's namespaces.
func insideNamespaces(t *testing.T) {
	require.Equal(t, 1, os.Getpid())
	// The image lies below /tmp, which is about to be hidden. The kernel mounts
	// erofs from a plain file too.
	image, err := os.Open(os.Getenv(inNamespaces))
	require.NoError(t, err)
	t.Cleanup(func() { _ = image.Close() })
	require.NoError(t, unix.Unshare(unix.CLONE_NEWCGROUP))
	require.NoError(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	for _, m := range [][3]string{
		{"proc", "/proc", ""}, {"cgroup2", "/sys/fs/cgroup", ""},
		{"tmpfs", "/run", "mode=755"}, {"tmpfs", "/tmp", "mode=1777"},
	} {
		require.NoError(t, unix.Mount(m[0], m[1], m[0], 0, m[2]), m[1])
	}
	startTasks(t, image).runCases(t, false)
}

// startTasks puts the parts together as main does.
func startTasks(t *testing.T, image *os.File) *vm {
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	sys, dev := fakeDisk(t, image)
	reaper, err := reap.Start(ctx)
	require.NoError(t, err)
	layers, err := rootfs.NewManager(rootfs.Config{Images: images, Layers: "/run/scratch/layers", Disks: disk.Finder{Sys: sys, Dev: dev}})
	require.NoError(t, err)
	pod := machine.Pod{Dir: podDir}
	require.NoError(t, os.MkdirAll(pod.Shm(), 0o755))
	for path, data := range map[string]string{pod.Hostname(): "web-0\n", pod.Hosts(): "127.0.0.1\tlocalhost\n", pod.ResolvConf(): ""} {
		require.NoError(t, os.WriteFile(path, []byte(data), 0o644))
	}
	require.NoError(t, unix.Mount("shm", pod.Shm(), "tmpfs", 0, "size=65536k"))
	streams := stdio.NewStreams()
	command, err := exec.LookPath("crun")
	require.NoError(t, err)
	tasks, err := task.New(task.Config{
		Bundles: bundles, CgroupRoot: "/sys/fs/cgroup", CgroupParent: "pod",
		Ready: func() error { return nil }, Pod: pod,
		Runtime: crun.Runtime{Command: command, Root: crunRoot},
		Reaper:  reaper, Streams: streams, RootFS: layers, Self: self,
		Namespaces: func() *podns.Namespaces { return nil },
	})
	require.NoError(t, err)
	server, err := rpc.NewServer()
	require.NoError(t, err)
	guestv1.RegisterTaskService(server, tasks)
	vm := &vm{t: t}
	sockets := map[uint32]string{api.PortRPC: "/tmp/rpc.sock", api.PortStream: "/tmp/stream.sock"}
	for port, serve := range map[uint32]func(net.Listener) error{
		api.PortRPC:    func(l net.Listener) error { return server.Serve(ctx, l) },
		api.PortStream: func(l net.Listener) error { return streams.Serve(ctx, l) },
	} {
		l, err := net.Listen("unix", sockets[port])
		require.NoError(t, err)
		go func() { _ = serve(l) }()
	}
	vm.dial = func(ctx context.Context, port uint32) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", sockets[port])
	}
	conn, err := vm.dial(ctx, api.PortRPC)
	require.NoError(t, err)
	vm.tasks = guestv1.NewTaskClient(ttrpc.NewClient(conn))
	vm.machine = infoOnly{}
	return vm
}

// infoOnly stands in for the Machine service, which changes the whole machine.
type infoOnly struct{ guestv1.MachineService }

func (infoOnly) Info(context.Context, *guestv1.InfoRequest) (*guestv1.InfoResponse, error) {
	return &guestv1.InfoResponse{}, nil
}

// fakeDisk makes the image look like a disk with its serial.
func fakeDisk(t *testing.T, image *os.File) (sys, dev string) {
	sys, dev = "/tmp/fake/sys", "/tmp/fake/dev"
	require.NoError(t, os.MkdirAll(filepath.Join(sys, "block/vdx"), 0o755))
	require.NoError(t, os.MkdirAll(dev, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(sys, "block/vdx/serial"), []byte(testImage), 0o644))
	require.NoError(t, os.Symlink(fmt.Sprintf("/proc/1/fd/%d", image.Fd()), filepath.Join(dev, "vdx")))
	return sys, dev
}
