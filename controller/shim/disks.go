// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloudhv/containerd-cloudhv/controller/directvolume"
	hostv1 "github.com/cloudhv/containerd-cloudhv/controller/hostapi/v1"
	"github.com/cloudhv/containerd-cloudhv/controller/shim/guestspec"
	"github.com/cloudhv/containerd-cloudhv/guest/api"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
)

// detachWait is for how long the delete of a container waits until its disks have been
// taken away; after that it is done in the background. containerd waits for 10 s.
const detachWait = 8 * time.Second

// containerDisks are the disks that a container wants.
type containerDisks struct {
	devices []guestspec.Disk
	// volumes are the places of direct volumes.
	volumes []int
}

func (d *containerDisks) none() bool { return len(d.devices)+len(d.volumes) == 0 }

// podDisks knows which containers may have disks of the host's.
type podDisks struct {
	mu sync.Mutex
	of map[string]containerDisks
}

func (d *podDisks) set(id string, disks containerDisks) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.of == nil {
		d.of = make(map[string]containerDisks)
	}
	d.of[id] = disks
}

func (d *podDisks) get(id string) containerDisks {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.of[id]
}

// drop forgets a container, and reports whether it had any.
func (d *podDisks) drop(id string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, ok := d.of[id]
	delete(d.of, id)
	return ok
}

// directMounts has the bind mounts of direct volumes come from the VM's disks, and returns
// their places. The others, which are volumes of the shim's to serve, it returns by their
// places among the mounts.
func (s *service) directMounts(mounts []specs.Mount) (places, others []int, _ error) {
	var errs []error
	for i := range mounts {
		m := &mounts[i]
		if m.Type != "bind" {
			continue
		}
		place, below, err := directvolume.Match(s.cfg.DirectVolumes, m.Source, s.cfg.PodUID)
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("mount %q: %w", m.Destination, err))
		case place == 0:
			others = append(others, i)
		case slices.Contains(m.Options, "slave") || slices.Contains(m.Options, "rslave"):
			errs = append(errs, fmt.Errorf("mount %q of a direct volume: propagation HostToContainer: want none, as nothing is mounted in it: %w",
				m.Destination, errdefs.ErrInvalidArgument))
		default:
			m.Source = path.Join(api.DiskRoot, directvolume.Serial(place), below)
			m.Options = diskOptions(m.Options)
			m.UIDMappings, m.GIDMappings = nil, nil
			if !slices.Contains(places, place) {
				places = append(places, place)
			}
		}
	}
	return places, others, errors.Join(errs...)
}

// diskOptions are those of a bind mount of a disk in the guest.
func diskOptions(options []string) []string {
	out := []string{"rbind", "rprivate"}
	for _, o := range options {
		switch o {
		case "ro", "rro":
			out = append(out, "ro")
		case "rw", "nosuid", "nodev", "noexec", "noatime", "nodiratime", "relatime", "strictatime":
			out = append(out, o)
		}
	}
	return out
}

// addMounts has all of a container's bind mounts come from what the VM has: direct volumes
// from its disks, and the rest from what the shim serves.
func (s *service) addMounts(id string, c *guestspec.Container) error {
	mounts := c.Spec.Mounts
	places, others, err := s.directMounts(mounts)
	if err != nil {
		return err
	}
	served := make([]specs.Mount, len(others))
	for i, at := range others {
		served[i] = mounts[at]
	}
	if err := s.volumes.add(id, served); err != nil {
		return err
	}
	for i, at := range others {
		mounts[at] = served[i]
	}
	if disks := (containerDisks{devices: c.Disks, volumes: places}); !disks.none() {
		s.disks.set(id, disks)
	}
	return nil
}

// attachDisks has the plugin make the disks that a container wants disks of the VM, and
// tells the guest of them.
func (s *service) attachDisks(ctx context.Context, id string, req *guestv1.CreateRequest) error {
	disks := s.disks.get(id)
	if disks.none() {
		return nil
	}
	ask := &hostv1.AttachDisksRequest{SandboxId: s.cfg.SandboxID, ContainerId: id}
	for _, d := range disks.devices {
		ask.Disks = append(ask.Disks, &hostv1.Disk{Major: d.Major, Minor: d.Minor, ReadOnly: d.ReadOnly()})
	}
	for _, place := range disks.volumes {
		ask.Disks = append(ask.Disks, &hostv1.Disk{DirectVolume: uint32(place)})
	}
	if err := failpoint.At(ctx, failpoint.TaskCreateDisks); err != nil {
		return err
	}
	var serials []string
	err := s.askHost(ctx, func(ctx context.Context, host hostv1.HostService) error {
		resp, err := host.AttachDisks(ctx, ask)
		if err == nil {
			serials = resp.Serials
		}
		return err
	})
	if errors.Is(err, errVMLost) {
		return err
	}
	if err == nil && len(serials) != len(ask.Disks) {
		err = fmt.Errorf("%d disks came for %d: %w", len(serials), len(ask.Disks), errdefs.ErrInternal)
	}
	if err != nil {
		return fmt.Errorf("disks of container %q: %w", id, err)
	}
	for i, d := range disks.devices {
		req.Devices = append(req.Devices, &guestv1.DiskDevice{
			Serial: serials[i], Path: d.Path, Access: d.Access, Mode: d.Mode, Uid: d.UID, Gid: d.GID,
		})
	}
	for _, place := range disks.volumes {
		v := s.cfg.DirectVolumes[place-1]
		req.Volumes = append(req.Volumes, &guestv1.DiskVolume{
			Serial: directvolume.Serial(place), FsType: v.FSType, Options: v.MountOptions(), ReadOnly: v.ReadOnly(),
		})
	}
	return nil
}

// detachDisks has the plugin take away the disks of a container that the guest has
// deleted, or never had. It waits for a while, so that nobody uses them on the host any more
// when kubelet hears that the container is gone.
func (s *service) detachDisks(ctx context.Context, id string) {
	if !s.disks.drop(id) || s.guest.lost() {
		return
	}
	done := make(chan struct{})
	s.running.Go(func() {
		defer close(done)
		err := failpoint.At(s.ctx, failpoint.TaskDeleteDisks)
		if err == nil {
			err = s.askHost(s.ctx, func(ctx context.Context, host hostv1.HostService) error {
				_, err := host.DetachDisks(ctx, &hostv1.DetachDisksRequest{SandboxId: s.cfg.SandboxID, ContainerId: id})
				return err
			})
		}
		if err != nil && !errors.Is(err, errVMLost) && s.ctx.Err() == nil {
			log.G(s.ctx).WithError(err).WithField("container", id).Warn("disks of a container that is gone stay in the VM")
		}
	})
	timer := time.NewTimer(detachWait)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
	case <-ctx.Done():
	}
}
