// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package faults

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
)

// scenario comes to points of a kind.
type scenario struct {
	name string
	// prepare is done before the point is armed, act after that. Both are repeated as long
	// as a call fails.
	prepare, act func(c *cell) error
	// with are points that have to do something too, so that the one under test is reached.
	with map[failpoint.Point]string
	// once tells that prepare kills containerd, and is not repeated.
	once bool
	// ends tells that act ends the pod; it need not outlive containerd then.
	ends bool
	// pool tells that a VM is ready on the node.
	pool bool
}

func nothing(*cell) error { return nil }

// to brings the pod to a level.
func to(l level) func(*cell) error {
	return func(c *cell) error { return c.k.up(l) }
}

func down(c *cell) error { return c.k.down() }

// Scenarios on a node without ready VMs.
var (
	starts   = scenario{name: "a pod starts", prepare: nothing, act: to(podReady)}
	boots    = scenario{name: "a pod boots", prepare: ownBoot, act: to(podReady)}
	ends     = scenario{name: "a pod ends", prepare: to(podReady), act: down, ends: true}
	resizes  = scenario{name: "a pod is resized", prepare: to(podReady), act: func(c *cell) error { return c.k.upAndResize() }}
	runs     = scenario{name: "a container runs", prepare: to(podReady), act: to(containerRuns)}
	executes = scenario{name: "a process is added", prepare: to(containerRuns), act: to(execDone)}
	updates  = scenario{name: "a container is updated", prepare: to(containerRuns), act: to(updated)}
	stops    = scenario{name: "a container ends", prepare: to(containerRuns), act: down, ends: true}
	images   = scenario{name: "an image is made", prepare: withoutImages, act: to(containerRuns)}
	loses    = scenario{name: "a VM is lost", prepare: to(containerRuns), act: lose, ends: true}
	disks    = scenario{name: "a container gets a disk", prepare: withDisk(podReady), act: to(containerRuns)}
	undisks  = scenario{name: "a container with a disk ends", prepare: withDisk(containerRuns), act: down, ends: true}
	restarts = scenario{name: "containerd is restarted", prepare: to(containerRuns), act: restart}
)

// Scenarios on a node with a VM that is ready.
var (
	takes     = scenario{name: "a pod gets a ready VM", prepare: nothing, act: to(podReady), pool: true}
	refills   = scenario{name: "the pool is refilled", prepare: nothing, act: refill, pool: true}
	discards  = scenario{name: "the pool is drained", prepare: nothing, act: drain, pool: true}
	snapshots = scenario{name: "the snapshot is made anew", prepare: nothing, act: rebuild, pool: true}
	readopts  = scenario{name: "containerd is restarted with a ready VM", prepare: nothing, act: restart, pool: true}
)

// special are the scenarios of single points, and byVerb those of the others, by the
// part of a point's name before the slash.
var special = map[failpoint.Point][]scenario{
	failpoint.AttachUnplug:      {runs.and(map[failpoint.Point]string{failpoint.AttachDone: failpoint.Fail})},
	failpoint.AttachRefused:     {runs.and(map[failpoint.Point]string{failpoint.AttachDisk: failpoint.Refuse})},
	failpoint.UpdateTakeBack:    {resizes.and(map[failpoint.Point]string{failpoint.UpdateGuestGrown: failpoint.Fail})},
	failpoint.UpdateSizing:      {{name: "a pod is limited otherwise, and as large", prepare: limitedTo(24), act: limitedTo(32)}},
	failpoint.VMMLoad:           {starts, refills},
	failpoint.DiscardKill:       {discards},
	failpoint.RecoverNone:       {restartsAfter("Create was killed", failpoint.CreateRecord)},
	failpoint.RecoverEnd:        {restartsAfter("Start was killed", failpoint.StartConfigure)},
	failpoint.RecoverAside:      {{name: "a record is damaged", prepare: damaged, act: restart, ends: true}},
	failpoint.RecoverPoolAttach: {readopts},
	failpoint.RecoverPoolKill:   {{name: "containerd is restarted with a VM that is half ready", prepare: halfReady, once: true, act: restart, pool: true}},
	failpoint.TaskLost:          {loses},
	failpoint.TaskCreateDisks:   {disks},
	failpoint.TaskDeleteDisks:   {undisks},
	failpoint.DiskForget:        {disks.and(map[failpoint.Point]string{failpoint.DiskPlug: failpoint.Fail})},
	failpoint.DiskShare:         {{name: "another container gets the disk", prepare: withDisk(containerRuns), act: another}},
	failpoint.DiskUnshare:       {{name: "containers with one disk end", prepare: sharedDisk, act: down, ends: true}},
	failpoint.DiskRelease:       {undisks},
	failpoint.DiskRemove:        {undisks},
	failpoint.DiskRemoved:       {undisks},
}

var byVerb = map[string][]scenario{
	"create": {starts}, "start": {starts}, "join": {starts}, "move": {starts}, "boot": {boots},
	"vm": {starts, refills}, "vmm": {starts, boots}, "end": {ends, stops}, "remove": {ends}, "discard": {ends, discards},
	"update": {resizes}, "attach": {runs}, "disk": {disks}, "image": {images},
	"handover": {takes}, "refill": {refills}, "snapshot": {snapshots}, "recover": {restarts},
	"task-create": {runs}, "task-start": {runs}, "exec": {executes}, "task-kill": {stops}, "task-delete": {stops}, "task-update": {updates},
}

// unreached are the points to which no scenario here comes, with the reason.
var unreached = map[failpoint.Point]string{
	failpoint.RecoverOrphan: "CRI would have to forget a pod, and with it what it has made itself; TestEachPointFails comes to it",
	failpoint.StartNIC:      "a pod with one interface has no further one; TestNetworks has",
	failpoint.DiskUnplug:    "a shim has a disk that failed taken away before a retry asks for it; TestBlockDeviceFails of controller comes to it",
	failpoint.JoinTAP:       "a pod with one interface has no further one; TestNetworks has",
}

// unreachedBy are those that a hypervisor does not come to.
var unreachedBy = map[string]map[failpoint.Point]string{
	"cloudhypervisor": {failpoint.VMMLoad: "it restores as its process starts"},
}

// scenariosOf are those that come to a point.
func scenariosOf(p failpoint.Point) []scenario {
	if s, ok := special[p]; ok {
		return s
	}
	verb, _, _ := strings.Cut(string(p), "/")
	return byVerb[verb]
}

// and is the scenario with more points that do something.
func (s scenario) and(with map[failpoint.Point]string) scenario {
	s.with = with
	return s
}

// limitedTo gives a pod a limit in MiB, below what the least VM has.
func limitedTo(mib int64) func(*cell) error {
	return func(c *cell) error {
		if err := c.k.up(podReady); err != nil {
			return err
		}
		return c.k.do("limit the pod", func(ctx context.Context) error {
			_, err := c.w.Runtime().UpdatePodSandboxResources(ctx, &runtimeapi.UpdatePodSandboxResourcesRequest{
				PodSandboxId: c.k.pod, Resources: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: mib << 20},
			})
			return err
		})
	}
}

// ownBoot wants a VM of its own for the pod.
func ownBoot(c *cell) error {
	c.k.cfg.Annotations["io.cloudhv.kernel_params"] = "cloudhv.test=yes"
	return nil
}

// withDisk gives the pod's container a block device of the host's.
func withDisk(l level) func(*cell) error {
	return func(c *cell) error {
		c.k.disk = c.w.disk
		return c.k.up(l)
	}
}

// another brings up a second container in the pod.
func another(c *cell) error {
	c.k.names = []string{"c", "d"}
	return c.k.up(containerRuns)
}

func sharedDisk(c *cell) error {
	c.k.disk = c.w.disk
	return another(c)
}

// withoutImages removes the files of images, so that they are made again.
func withoutImages(c *cell) error {
	if err := c.k.up(podReady); err != nil {
		return err
	}
	files, err := filepath.Glob(c.w.Dir("cache", "images", "*.erofs"))
	for _, f := range files {
		err = errors.Join(err, os.Remove(f))
	}
	return err
}

// lose kills the VMM of a pod that runs, once, and then ends the pod.
func lose(c *cell) error {
	if !c.lost {
		c.lost = true
		if err := kill(c.w.Node, killVMM); err != nil {
			return err
		}
	}
	return c.k.down()
}

// restart stops containerd, once, and then brings the pod up.
func restart(c *cell) error {
	if !c.restarted {
		c.restarted = true
		ctx, cancel := limit(restLimit)
		defer cancel()
		if err := c.k.do("restart", func(context.Context) error { return c.w.Restart(ctx, true) }); err != nil {
			return err
		}
	}
	if c.s.pool {
		return c.k.up(podReady)
	}
	return c.k.up(execDone)
}

// restartsAfter restarts after a Create or Start that was killed half-way.
func restartsAfter(name string, p failpoint.Point) scenario {
	return scenario{name: "containerd is restarted when " + name, once: true, ends: true, act: restart, prepare: func(c *cell) error {
		if err := c.w.arm(p, failpoint.Kill); err != nil {
			return err
		}
		if err := c.k.up(podReady); err == nil {
			return fmt.Errorf("containerd was not killed at %s: %w", p, errdefs.ErrUnknown)
		}
		c.k.calls = nil // they were to fail
		<-c.w.Ended()
		return c.w.release(p)
	}}
}

// damaged spoils the record of a pod.
func damaged(c *cell) error {
	if err := c.k.up(containerRuns); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(c.w.StateDir(), c.k.pod, "record.json"), []byte("{"), 0o600)
}

// halfReady kills containerd while a VM is made ready.
func halfReady(c *cell) error {
	if err := c.w.arm(failpoint.RefillPause, failpoint.Kill); err != nil {
		return err
	}
	if err := c.k.up(podReady); err != nil {
		return err
	}
	<-c.w.Ended()
	return c.w.release(failpoint.RefillPause)
}

// refill lets a pod take the ready VM, and waits for another.
func refill(c *cell) error {
	if err := c.k.up(podReady); err != nil {
		return err
	}
	return c.k.do("refill", func(ctx context.Context) error {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		ended := c.w.Ended()
		go func() {
			select {
			case <-ended:
				cancel()
			case <-ctx.Done():
			}
		}()
		return c.w.rest(ctx)
	})
}

// drain empties the pool, and fills it again.
func drain(c *cell) error {
	if err := c.ctl("drain"); err != nil {
		return err
	}
	return c.ctl("fill")
}

func rebuild(c *cell) error {
	if c.rebuilt {
		return nil
	}
	err := c.ctl("rebuild")
	c.rebuilt = err == nil
	return err
}

// ctl runs a command of cloudhvctl.
func (c *cell) ctl(command string) error {
	return c.k.do(command, func(ctx context.Context) error {
		_, errOut, err := c.w.Ctl(ctx, command)
		if err != nil {
			return fmt.Errorf("%w: %s", err, strings.TrimSpace(errOut))
		}
		return nil
	})
}
