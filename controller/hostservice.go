// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/protobuf/types/known/emptypb"

	hostv1 "github.com/cloudhv/containerd-cloudhv/controller/hostapi/v1"
	"github.com/cloudhv/containerd-cloudhv/controller/rootfs"
	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// HostService serves the shims' requests, on containerd's own ttrpc socket.
type HostService struct {
	c *Controller
}

var _ hostv1.HostService = (*HostService)(nil)

// HostService returns the service for shims.
func (c *Controller) HostService() *HostService {
	return &HostService{c: c}
}

// AttachRootFS implements hostv1.HostService.
func (h *HostService) AttachRootFS(ctx context.Context, req *hostv1.AttachRootFSRequest) (*hostv1.AttachRootFSResponse, error) {
	ctx = withPod(ctx, req.GetSandboxId())
	begin := time.Now()
	serial, err := h.c.attachRootFS(ctx, req.GetSandboxId(), req.GetContainerId())
	if err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("root file system of container %q: %w", req.GetContainerId(), err))
	}
	rootfsTimer.UpdateSince(begin)
	return &hostv1.AttachRootFSResponse{ImageSerial: serial}, nil
}

// Resize implements hostv1.HostService.
func (h *HostService) Resize(ctx context.Context, req *hostv1.ResizeRequest) (*emptypb.Empty, error) {
	ctx = withPod(ctx, req.GetSandboxId())
	containers := make([]limits, 0, len(req.GetContainers()))
	for _, l := range req.GetContainers() {
		containers = append(containers, limits{memory: l.GetMemoryBytes(), quota: l.GetCpuQuota(), period: l.GetCpuPeriod()})
	}
	if err := h.c.fitContainers(ctx, req.GetSandboxId(), containers, req.GetShrinkMemory(), req.GetShrinkVcpus()); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &emptypb.Empty{}, nil
}

// attachRootFS makes the container's image a disk of the sandbox's VM, once a
// VM, and returns the serial by which the guest finds it.
func (c *Controller) attachRootFS(ctx context.Context, sandboxID, containerID string) (string, error) {
	p, err := c.get(sandboxID)
	if err != nil {
		return "", err
	}
	if _, err := p.machine(); err != nil {
		return "", err
	}
	ns := p.snapshot().Namespace
	container, err := c.containerOf(ctx, p, containerID)
	if err != nil {
		return "", err
	}
	if err := failpoint.At(ctx, failpoint.AttachImage); err != nil {
		return "", err
	}
	img, err := c.images.Get(ctx, rootfs.Source{
		Namespace: ns, Snapshotter: container.Snapshotter, Key: container.SnapshotKey,
	})
	if err != nil {
		return "", err
	}
	pl, err := c.plugImage(ctx, p, img)
	if err != nil {
		return "", err
	}
	select {
	case <-pl.done:
		if pl.err == nil && c.prebuild != nil {
			c.prebuild.Ran(ns, container.Image, container.Snapshotter)
		}
		return pl.serial, pl.err
	case <-ctx.Done():
		return "", fmt.Errorf("plug in the image: %w", context.Cause(ctx))
	}
}

// containerOf finds a container of a sandbox's in containerd.
func (c *Controller) containerOf(ctx context.Context, p *pod, containerID string) (containers.Container, error) {
	container, err := c.containers.Get(namespaces.WithNamespace(ctx, p.snapshot().Namespace), containerID)
	if err != nil {
		return container, err
	}
	if container.SandboxID != p.id {
		return container, fmt.Errorf("container %q is of sandbox %q, not %q: %w",
			containerID, container.SandboxID, p.id, errdefs.ErrInvalidArgument)
	}
	return container, nil
}

// plug is the plugging of one image into one VM.
type plug struct {
	done chan struct{}
	// serial is that of the disk in the guest.
	serial string
	err    error
}

// plugImage begins to make an image a disk of the VM, or joins whoever does. It
// takes over the image's pin.
func (c *Controller) plugImage(ctx context.Context, p *pod, img *rootfs.Image) (*plug, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if pl, ok := p.plugs[img.Key]; ok {
		img.Release()
		return pl, nil
	}
	pl := &plug{done: make(chan struct{})}
	plugged, known := p.rec.Images[img.Key]
	if plugged {
		img.Release()
		pl.serial = p.rec.serialOf(img)
		close(pl.done)
		return pl, nil
	}
	vm, err := p.machineLocked()
	if err != nil {
		img.Release()
		return nil, err
	}
	if err := p.updateLocked(ctx, failpoint.AttachRecord, func(r *record) { r.Images = with(r.Images, img.Key, false) }); err != nil {
		img.Release()
		return nil, err
	}
	if old := p.pins[img.Key]; old != nil {
		old.Release()
	}
	p.pins[img.Key] = img
	p.plugs[img.Key] = pl
	go func() {
		defer close(pl.done)
		// Detached: another container may wait for the same image.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.cfg.HotPlugTimeout)
		defer cancel()
		pl.serial, pl.err = c.addImage(ctx, p, vm, img, known)
	}()
	return pl, nil
}

// addImage plugs the disk in and records it. A disk of which it is not known
// whether it is plugged in, as an earlier attempt did not end well, is unplugged
// first. It returns the serial by which the guest finds it.
func (c *Controller) addImage(ctx context.Context, p *pod, vm vmm.VM, img *rootfs.Image, unsure bool) (serial string, err error) {
	if unsure {
		if err = failpoint.At(ctx, failpoint.AttachUnplug); err == nil {
			err = vm.RemoveDisk(ctx, img.Serial)
		}
		unsure = err != nil
	}
	if err == nil {
		err = failpoint.At(ctx, failpoint.AttachDisk)
	}
	if err == nil {
		serial, err = vm.AddDisk(ctx, vmm.Disk{Serial: img.Serial, Path: img.Path, ReadOnly: true})
		unsure = err != nil && !isRefusal(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.plugs, img.Key)
	if unsure {
		// The VM may have the disk: its file has to stay, and the record says so.
		return "", fmt.Errorf("plug in the image: %w", err)
	}
	if err != nil {
		delete(p.pins, img.Key)
		img.Release()
		undo := p.updateLocked(ctx, failpoint.AttachRefused, func(r *record) { r.Images = without(r.Images, img.Key) })
		return "", errors.Join(fmt.Errorf("plug in the image: %w", err), undo)
	}
	return serial, p.updateLocked(ctx, failpoint.AttachDone, func(r *record) {
		r.Images = with(r.Images, img.Key, true)
		switch {
		case serial == vmm.ImageSerial:
			r.ImageDisk = img.Key
		case r.ImageDisk == img.Key:
			r.ImageDisk = ""
		}
		r.VM = stateOf(vm)
	})
}

// serialOf is that of an image's disk in the guest, once it is plugged in.
func (r *record) serialOf(img *rootfs.Image) string {
	if r.ImageDisk == img.Key {
		return vmm.ImageSerial
	}
	return img.Serial
}

// isRefusal is true for an error of a hot-plug that was refused, so that the VM is
// as it was. After any other, such as a time that was up, that is open.
func isRefusal(err error) bool {
	if isContextError(err) {
		return false
	}
	return errdefs.IsInvalidArgument(err) || errdefs.IsNotImplemented(err) || errdefs.IsResourceExhausted(err) ||
		errdefs.IsFailedPrecondition(err) || errdefs.IsNotFound(err)
}

// with and without copy a map: records are copied by value.
func with(m map[string]bool, key string, value bool) map[string]bool {
	m = maps.Clone(m)
	if m == nil {
		m = map[string]bool{}
	}
	m[key] = value
	return m
}

func without(m map[string]bool, key string) map[string]bool {
	m = maps.Clone(m)
	delete(m, key)
	return m
}
