// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/cloudhv/containerd-cloudhv/controller/blockdev"
	hostv1 "github.com/cloudhv/containerd-cloudhv/controller/hostapi/v1"
	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// blockNodesDir has nodes of block devices while they are plugged in, in the cache
// directory.
const blockNodesDir = "devices"

// hostDisk is a disk of the host's that a sandbox's VM has, or may have.
type hostDisk struct {
	// Plugged is false while it is being plugged in or unplugged, and after that failed
	// half-way: the VM may have it.
	Plugged bool `json:"plugged"`
	// Containers are those that have it.
	Containers []string `json:"containers,omitempty"`
	ReadOnly   bool     `json:"read_only,omitempty"`
	// Direct is the place of the direct volume that it is, or 0, and Identity what that is
	// known by among all names that it may have.
	Direct   int    `json:"direct,omitempty"`
	Identity string `json:"identity,omitempty"`
}

func (d hostDisk) has(container string) bool { return slices.Contains(d.Containers, container) }

// with is the disk with a container more, without with one less.
func (d hostDisk) with(container string) hostDisk {
	d = d.without(container)
	d.Containers = append(d.Containers, container)
	return d
}

func (d hostDisk) without(container string) hostDisk {
	d.Containers = slices.DeleteFunc(slices.Clone(d.Containers), func(c string) bool { return c == container })
	return d
}

// setDisk and dropDisk copy the map: records are copied by value.
func (r *record) setDisk(serial string, d hostDisk) {
	r.Disks = maps.Clone(r.Disks)
	if r.Disks == nil {
		r.Disks = map[string]hostDisk{}
	}
	r.Disks[serial] = d
}

func (r *record) dropDisk(serial string) {
	r.Disks = maps.Clone(r.Disks)
	delete(r.Disks, serial)
}

// deviceSerial is that of a block device in the guest. It has another for reading only,
// which the VMM then opens it for.
func deviceSerial(n blockdev.Number, readOnly bool) string {
	serial := fmt.Sprintf("dev-%d-%d", n.Major, n.Minor)
	if readOnly {
		serial += "-r"
	}
	return serial
}

// AttachDisks implements hostv1.HostService.
func (h *HostService) AttachDisks(ctx context.Context, req *hostv1.AttachDisksRequest) (*hostv1.AttachDisksResponse, error) {
	serials, err := h.c.attachDisks(withPod(ctx, req.GetSandboxId()), req)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return &hostv1.AttachDisksResponse{Serials: serials}, nil
}

// DetachDisks implements hostv1.HostService.
func (h *HostService) DetachDisks(ctx context.Context, req *hostv1.DetachDisksRequest) (*emptypb.Empty, error) {
	ctx = withPod(ctx, req.GetSandboxId())
	if err := h.c.detachDisks(ctx, req.GetSandboxId(), req.GetContainerId()); err != nil {
		log.G(ctx).WithError(err).WithField("container", req.GetContainerId()).Warn("disks of a container that is gone stay in its VM")
		return nil, errgrpc.ToGRPC(err)
	}
	return &emptypb.Empty{}, nil
}

func (c *Controller) attachDisks(ctx context.Context, req *hostv1.AttachDisksRequest) ([]string, error) {
	p, err := c.get(req.GetSandboxId())
	if err != nil {
		return nil, err
	}
	if _, err := c.containerOf(ctx, p, req.GetContainerId()); err != nil {
		return nil, err
	}
	// Half of it would be of no use to who has gone, and be undone the better the less is open.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.cfg.HotPlugTimeout)
	defer cancel()
	if err := lockChan(ctx, p.disking); err != nil {
		return nil, fmt.Errorf("wait for other disks of the sandbox: %w", err)
	}
	defer func() { <-p.disking }()
	serials := make([]string, len(req.GetDisks()))
	for i, d := range req.GetDisks() {
		if serials[i], err = c.attachDisk(ctx, p, req.GetContainerId(), d); err != nil {
			return nil, err
		}
	}
	return serials, nil
}

// attachDisk gives a container a disk, which is plugged in unless it is there.
func (c *Controller) attachDisk(ctx context.Context, p *pod, container string, d *hostv1.Disk) (string, error) {
	if d.GetDirectVolume() > 0 {
		return c.attachVolume(ctx, p, container, int(d.GetDirectVolume()))
	}
	source, err := c.blockNodes.Open(blockdev.Number{Major: d.GetMajor(), Minor: d.GetMinor()})
	if err != nil {
		return "", err
	}
	defer c.closeSource(ctx, source)
	want := hostDisk{ReadOnly: d.GetReadOnly() || source.ReadOnly}
	serial := deviceSerial(source.Number, want.ReadOnly)
	if has, err := p.shareDisk(ctx, serial, container); has || err != nil {
		return serial, err
	}
	unsure, err := p.expectDisk(ctx, serial, container, want)
	if err != nil {
		return "", err
	}
	if err := c.plugDisk(ctx, p, container, serial, want, source, unsure); err != nil {
		return "", fmt.Errorf("plug in block device %s: %w", source.Number, err)
	}
	return serial, nil
}

func (c *Controller) closeSource(ctx context.Context, s *blockdev.Source) {
	if err := s.Close(); err != nil {
		log.G(ctx).WithError(err).Warn("cannot remove a node of a block device")
	}
}

// shareDisk gives a container a disk that is plugged in, and reports whether it is.
func (p *pod) shareDisk(ctx context.Context, serial, container string) (bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	have := p.rec.Disks[serial]
	if !have.Plugged {
		return false, nil
	}
	if have.has(container) {
		return true, nil
	}
	return true, p.updateLocked(ctx, failpoint.DiskShare, func(r *record) { r.setDisk(serial, have.with(container)) })
}

// expectDisk records that a container is about to get a disk. It reports whether the VM may
// have that already, as an earlier attempt did not end well.
func (p *pod) expectDisk(ctx context.Context, serial, container string, want hostDisk) (unsure bool, _ error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, unsure = p.rec.Disks[serial]
	return unsure, p.updateLocked(ctx, failpoint.DiskRecord, func(r *record) { r.setDisk(serial, want.with(container)) })
}

// forgetDisk records that a container has not got a disk, which the VM does not have
// either, or may have.
func (p *pod) forgetDisk(ctx context.Context, serial string, want hostDisk, unsure bool) error {
	return p.update(ctx, failpoint.DiskForget, func(r *record) {
		if unsure {
			r.setDisk(serial, want)
		} else {
			r.dropDisk(serial)
		}
	})
}

// plugDisk plugs a disk in that is expected, and records what came of it. One that the VM
// may have is unplugged first.
func (c *Controller) plugDisk(ctx context.Context, p *pod, container, serial string, want hostDisk, source *blockdev.Source, unsure bool) error {
	vm, err := p.machine()
	if err == nil && unsure {
		if err = failpoint.At(ctx, failpoint.DiskUnplug); err == nil {
			err = vm.RemoveDisk(ctx, serial)
		}
		unsure = err != nil
	}
	if err == nil {
		err = failpoint.At(ctx, failpoint.DiskPlug)
	}
	if err == nil {
		_, err = vm.AddDisk(ctx, vmm.Disk{Serial: serial, Path: source.Path, ReadOnly: want.ReadOnly})
		unsure = err != nil && !isRefusal(err)
	}
	if err != nil {
		return errors.Join(err, p.forgetDisk(ctx, serial, want, unsure))
	}
	want.Plugged = true
	return p.update(ctx, failpoint.DiskDone, func(r *record) {
		r.setDisk(serial, want.with(container))
		r.VM = stateOf(vm)
	})
}

// detachDisks takes a container's disks away. What is in doubt is unplugged too.
func (c *Controller) detachDisks(ctx context.Context, sandboxID, container string) error {
	p, err := c.get(sandboxID)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.cfg.HotPlugTimeout)
	defer cancel()
	if err := lockChan(ctx, p.disking); err != nil {
		return fmt.Errorf("wait for other disks of the sandbox: %w", err)
	}
	defer func() { <-p.disking }()
	var errs []error
	rec := p.snapshot()
	for _, serial := range slices.Sorted(maps.Keys(rec.Disks)) {
		d := rec.Disks[serial]
		if !d.has(container) && len(d.Containers) > 0 {
			continue
		}
		if err := p.releaseDisk(ctx, serial, d.without(container)); err != nil {
			errs = append(errs, fmt.Errorf("disk %s: %w", serial, err))
		}
	}
	return errors.Join(errs...)
}

// releaseDisk records who has a disk still, and unplugs it if nobody does.
func (p *pod) releaseDisk(ctx context.Context, serial string, left hostDisk) error {
	if len(left.Containers) > 0 {
		return p.update(ctx, failpoint.DiskUnshare, func(r *record) { r.setDisk(serial, left) })
	}
	vm, err := p.machine()
	if p.isEnding() {
		return nil // it goes with the VM
	}
	if err != nil {
		return err
	}
	left.Plugged = false
	if err := p.update(ctx, failpoint.DiskRelease, func(r *record) { r.setDisk(serial, left) }); err != nil {
		return err
	}
	if err := failpoint.At(ctx, failpoint.DiskRemove); err != nil {
		return err
	}
	if err := vm.RemoveDisk(ctx, serial); err != nil {
		return err
	}
	return p.update(ctx, failpoint.DiskRemoved, func(r *record) {
		r.dropDisk(serial)
		r.VM = stateOf(vm)
	})
}
