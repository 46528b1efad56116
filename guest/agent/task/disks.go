// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package task

import (
	"context"
	"fmt"
	"io/fs"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/diskfs"
	"github.com/cloudhv/containerd-cloudhv/guest/api"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

const (
	// deviceLimit is how long a disk may take to appear: the host plugs it before it asks
	// for the container.
	deviceLimit = 30 * time.Second
	// maxDisks bounds a container's disks, of each kind.
	maxDisks = 64
)

// checkDisks checks what a request says of disks, as far as that can be done by looking
// at it.
func checkDisks(r *guestv1.CreateRequest) error {
	if len(r.GetDevices()) > maxDisks || len(r.GetVolumes()) > maxDisks {
		return fmt.Errorf("%d devices and %d volumes: at most %d of each: %w",
			len(r.GetDevices()), len(r.GetVolumes()), maxDisks, errdefs.ErrInvalidArgument)
	}
	for _, d := range r.GetDevices() {
		if !path.IsAbs(d.GetPath()) || strings.ContainsRune(d.GetPath(), 0) {
			return fmt.Errorf("device %q: want an absolute path: %w", d.GetPath(), errdefs.ErrInvalidArgument)
		}
		if strings.Trim(d.GetAccess(), "rwm") != "" {
			return fmt.Errorf("device %q: access %q: want some of r, w and m: %w", d.GetPath(), d.GetAccess(), errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// addDevices gives a spec the nodes of the VM's disks, and the right to use these and no
// others.
func (c *container) addDevices(ctx context.Context, devices []*guestv1.DiskDevice, spec *specs.Spec) error {
	for _, d := range devices {
		node, err := c.s.cfg.Disks.Wait(ctx, d.GetSerial(), deviceLimit)
		if err != nil {
			return fmt.Errorf("device %q: %w", d.GetPath(), err)
		}
		var st unix.Stat_t
		if err := unix.Stat(node, &st); err != nil {
			return fmt.Errorf("device %q: %w", d.GetPath(), err)
		}
		major, minor := int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
		mode, uid, gid := fs.FileMode(d.GetMode()).Perm(), d.GetUid(), d.GetGid()
		spec.Linux.Devices = append(spec.Linux.Devices, specs.LinuxDevice{
			Path: d.GetPath(), Type: "b", Major: major, Minor: minor, FileMode: &mode, UID: &uid, GID: &gid,
		})
		if d.GetAccess() == "" {
			continue
		}
		if spec.Linux.Resources == nil {
			spec.Linux.Resources = &specs.LinuxResources{}
		}
		spec.Linux.Resources.Devices = append(spec.Linux.Resources.Devices,
			specs.LinuxDeviceCgroup{Allow: true, Type: "b", Major: &major, Minor: &minor, Access: d.GetAccess()})
	}
	return nil
}

// mountVolumes mounts the file systems of the container's disks, and has the spec's mounts
// of them come from places that no link in them changes. destroy gives them up.
func (c *container) mountVolumes(ctx context.Context, volumes []*guestv1.DiskVolume, spec *specs.Spec) error {
	for _, v := range volumes {
		err := c.s.cfg.Volumes.Use(ctx, c.id, diskfs.Volume{
			Serial: v.GetSerial(), FSType: v.GetFsType(), Options: v.GetOptions(), ReadOnly: v.GetReadOnly(),
		})
		if err != nil {
			return err
		}
	}
	for i := range spec.Mounts {
		m := &spec.Mounts[i]
		in, ok := strings.CutPrefix(m.Source, api.DiskRoot+"/")
		if !ok || m.Type != "bind" {
			continue
		}
		serial, below, _ := strings.Cut(in, "/")
		target := filepath.Join(c.bundle, "volumes", strconv.Itoa(i))
		userns := c.s.cfg.Namespaces().File()
		if err := c.s.cfg.Volumes.Bind(c.id, serial, below, target, userns); err != nil {
			return fmt.Errorf("mount %q: %w", m.Destination, err)
		}
		m.Source = target
	}
	return nil
}
