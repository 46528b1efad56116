// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// The agent is the first process of a pod's VM. It sets the machine up, serves
// the API of guest/api to the host, and runs containers by crun. Each of its
// parts is a package beside this file; here they are put together.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/agentlog"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/boot"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/cgroup"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/crun"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/disk"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/diskfs"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/forward"
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

// version is set by the linker.
var version = "dev"

// Where things are in the VM.
const (
	crunBinary = "/bin/crun"
	crunRoot   = "/run/crun"
	bundles    = "/run/containers"
	images     = "/run/images"
	layers     = boot.Scratch + "/layers"
	podDir     = "/run/pod"
	self       = "/proc/self/exe"

	// flushLimit is how long the last words may take to the console.
	flushLimit = 5 * time.Second
)

func main() {
	start := boot.Uptime()
	flush := agentlog.Setup(os.Stderr)
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "containerd-cloudhv agent", version, "runs as the first process of a VM only")
		os.Exit(2)
	}
	err := run(context.Background(), start)
	log.L.WithError(err).Error("the agent ends, and the VM with it")
	flush(flushLimit)
	if err := (machine.VM{}).PowerOff(); err != nil {
		log.L.WithError(err).Error("cannot power off")
		flush(flushLimit)
	}
}

// run returns only on an error.
func run(ctx context.Context, start time.Duration) error {
	// The kernel sends some on keys and buttons; the default would be a panic.
	// They must not be ignored, as children would inherit that.
	signal.Notify(make(chan os.Signal, 1), unix.SIGHUP, unix.SIGINT, unix.SIGTERM, unix.SIGPWR)
	if err := boot.Machine(ctx); err != nil {
		return err
	}
	memory, err := machine.NewMemory()
	if err != nil {
		return err
	}
	reaper, err := reap.Start(ctx)
	if err != nil {
		return err
	}
	quota, err := boot.ScratchDisk(ctx, boot.Scratch)
	if err != nil {
		return err
	}
	layerManager, err := rootfs.NewManager(rootfs.Config{Images: images, Layers: layers, Disks: disk.Finder{}, Quota: quota})
	if err != nil {
		return err
	}
	ports, err := listen(ctx)
	if err != nil {
		return err
	}
	ready := boot.Uptime()
	volumes := diskfs.NewManager(api.DiskRoot, disk.Finder{})
	vm := machine.New(machine.Config{
		Version: version, AgentStart: start, Ready: ready,
		PodDir: podDir, Memory: memory, System: machine.VM{Unmount: volumes.Close},
		Namespaces: func(u *guestv1.UserNamespace) (*podns.Namespaces, error) { return podns.New(self, reaper, u) },
	})
	streams := stdio.NewStreams()
	tasks, err := task.New(task.Config{
		Bundles: bundles, CgroupRoot: cgroup.Mountpoint, CgroupParent: boot.PodCgroup,
		Ready: vm.Configured, Pod: machine.Pod{Dir: podDir}, Namespaces: vm.Namespaces,
		Runtime: crun.Runtime{Command: crunBinary, Root: crunRoot},
		Reaper:  reaper, Streams: streams, RootFS: layerManager, Volumes: volumes, Self: self,
	})
	if err != nil {
		return err
	}
	if err := boot.Preload(crunBinary); err != nil {
		log.G(ctx).WithError(err).Warn("the first container will start slower")
	}
	log.G(ctx).WithField("start_ms", start.Milliseconds()).WithField("ready_ms", ready.Milliseconds()).
		WithField("quota", quota).Info("ready, version " + version)
	return serve(ctx, ports, vm, tasks, streams)
}

// serve answers the host until a listener fails.
func serve(ctx context.Context, p ports, vm *machine.Service, tasks *task.Service, streams *stdio.Streams) error {
	server, err := rpc.NewServer()
	if err != nil {
		return err
	}
	guestv1.RegisterMachineService(server, vm)
	guestv1.RegisterTaskService(server, tasks)
	inPod := func(f func() error) error { return vm.Namespaces().Do(f) }
	failed := make(chan error, 3)
	go func() { failed <- server.Serve(ctx, p.rpc) }()
	go func() { failed <- streams.Serve(ctx, p.stream) }()
	go func() { failed <- forward.NewServer(inPod).Serve(ctx, p.forward) }()
	return errors.Join(errors.New("a listener ended"), <-failed)
}
