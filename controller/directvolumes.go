// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/controller/annotation"
	"github.com/cloudhv/containerd-cloudhv/controller/blockdev"
	"github.com/cloudhv/containerd-cloudhv/controller/directvolume"
)

// parseDirectVolumes reads a pod's direct volumes. What they are on is looked at when all
// annotations have been read.
func parseDirectVolumes(p parsing, o *overrides, value string) (err error) {
	switch {
	case p.kata:
		return errors.New("there is only " + annotation.Own + annotation.DirectVolumes)
	case len(p.cfg.DirectVolumes) == 0:
		return errors.New("this node's configuration allows no direct volumes (direct_volumes)")
	}
	o.direct, err = directvolume.Parse(value)
	return err
}

// checkVolumes refuses direct volumes that are not there, or where the node's
// configuration has none.
func (c *Controller) checkVolumes(o *overrides) error {
	var errs []error
	seen := map[string]string{}
	for _, v := range o.direct {
		found, err := c.findVolume(v)
		if err == nil {
			if other, ok := seen[found.Identity()]; ok {
				err = fmt.Errorf("it is that of volume %q too: want one volume for each: %w", other, errdefs.ErrInvalidArgument)
			}
			seen[found.Identity()] = v.Volume
			err = errors.Join(err, found.Close())
		}
		if err != nil {
			errs = append(errs, sentinel(fmt.Errorf("%s: device %q: %w", o.said[annotation.DirectVolumes].key, v.Device, err), errdefs.ErrInvalidArgument))
		}
	}
	return errors.Join(errs...)
}

// attachVolume gives a container a direct volume of its pod's.
func (c *Controller) attachVolume(ctx context.Context, p *pod, container string, place int) (string, error) {
	volumes := p.snapshot().Direct
	if place > len(volumes) {
		return "", fmt.Errorf("direct volume %d: the pod has %d: %w", place, len(volumes), errdefs.ErrInvalidArgument)
	}
	v, serial := volumes[place-1], directvolume.Serial(place)
	if has, err := p.shareDisk(ctx, serial, container); has || err != nil {
		return serial, err
	}
	if err := c.plugVolume(ctx, p, container, place, v); err != nil {
		return "", fmt.Errorf("direct volume %q on %s: %w", v.Volume, v.Device, err)
	}
	return serial, nil
}

// plugVolume plugs in a direct volume that nobody else has mounted: two kernels with one
// file system would destroy it.
func (c *Controller) plugVolume(ctx context.Context, p *pod, container string, place int, v directvolume.Volume) error {
	found, err := c.findVolume(v)
	if err != nil {
		return err
	}
	defer found.Close() //nolint:errcheck // a path
	serial, want := directvolume.Serial(place), hostDisk{ReadOnly: v.ReadOnly(), Direct: place, Identity: found.Identity()}
	unsure, err := c.claimVolume(ctx, p, serial, container, want)
	if err != nil {
		return err
	}
	source, err := c.openVolume(found, want.ReadOnly)
	if err != nil {
		return errors.Join(err, p.forgetDisk(ctx, serial, want, unsure))
	}
	defer c.closeSource(ctx, source)
	return c.plugDisk(ctx, p, container, serial, want, source, unsure)
}

// claimVolume expects a direct volume that no other VM has. That is decided for one after
// the other, so that no two find each other missing.
func (c *Controller) claimVolume(ctx context.Context, p *pod, serial, container string, want hostDisk) (unsure bool, _ error) {
	if err := lockChan(ctx, c.directs); err != nil {
		return false, fmt.Errorf("wait for other direct volumes: %w", err)
	}
	defer func() { <-c.directs }()
	if err := c.checkAlone(p, want); err != nil {
		return false, err
	}
	return p.expectDisk(ctx, serial, container, want)
}

// openVolume makes a disk's source of what a direct volume is on.
func (c *Controller) openVolume(found *blockdev.Found, readOnly bool) (*blockdev.Source, error) {
	source, err := found.Source(c.blockNodes, readOnly)
	if err != nil {
		return nil, err
	}
	if found.Device {
		err = source.InUse()
	}
	if err == nil && source.ReadOnly && !readOnly {
		err = fmt.Errorf("block device %s cannot be written to: want the option ro: %w", source.Number, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return nil, errors.Join(err, source.Close())
	}
	return source, nil
}

// checkAlone refuses a direct volume that another VM has, unless both only read it.
func (c *Controller) checkAlone(p *pod, want hostDisk) error {
	for _, other := range c.allPods() {
		rec := other.snapshot()
		if other == p || rec.State == StateStopped {
			continue
		}
		for _, d := range rec.Disks {
			if d.Identity == want.Identity && (!d.ReadOnly || !want.ReadOnly) {
				return fmt.Errorf("sandbox %q has it, and one of the two writes: want it in one pod at a time: %w", rec.ID, errdefs.ErrFailedPrecondition)
			}
		}
	}
	return nil
}

// findVolume finds what a direct volume is on, where the node's configuration lets it be.
func (c *Controller) findVolume(v directvolume.Volume) (*blockdev.Found, error) {
	found, err := blockdev.Find(v.Device)
	if err != nil {
		return nil, err
	}
	if !isAllowedPath(found.Path, c.cfg.DirectVolumes) {
		err := fmt.Errorf("it is %s, where this node's configuration allows none (direct_volumes): %w", found.Path, errdefs.ErrInvalidArgument)
		return nil, errors.Join(err, found.Close())
	}
	return found, nil
}

// isAllowedPath says whether one of a list is the path, a directory above it, or, with a
// * at its end, how it begins. The path has no links in it; those in the list's are followed.
func isAllowedPath(path string, allowed []string) bool {
	for _, a := range allowed {
		if prefix, ok := strings.CutSuffix(a, "*"); ok {
			dir, name := filepath.Split(prefix)
			if strings.HasPrefix(path, strings.TrimSuffix(resolved(dir), "/")+"/"+name) {
				return true
			}
		} else if a = resolved(a); path == a || strings.HasPrefix(path, strings.TrimSuffix(a, "/")+"/") {
			return true
		}
	}
	return false
}

// resolved is a path without links, or, if it is not there, the path.
func resolved(path string) string {
	if to, err := filepath.EvalSymlinks(path); err == nil {
		return to
	}
	return path
}
