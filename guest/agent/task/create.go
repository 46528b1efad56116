// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package task

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloudhv/containerd-cloudhv/guest/agent/crun"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/rootfs"
	"github.com/cloudhv/containerd-cloudhv/guest/agent/stdio"
	"github.com/cloudhv/containerd-cloudhv/guest/api"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// Create implements the Task service. A failed create leaves nothing, and ends
// the streams that it names.
func (s *Service) Create(ctx context.Context, r *guestv1.CreateRequest) (_ *guestv1.CreateResponse, retErr error) {
	io, err := s.openIO(r.GetStdio())
	if err != nil {
		return nil, err
	}
	defer func() {
		if retErr != nil {
			io.Close()
		}
	}()
	if err := s.cfg.Ready(); err != nil {
		return nil, err
	}
	spec, err := checkCreate(r)
	if err != nil {
		return nil, err
	}
	if err := s.cfg.Namespaces().Check(spec.Linux); err != nil {
		return nil, err
	}
	if r.GetRootfs() == nil {
		return nil, fmt.Errorf("rootfs: missing: %w", errdefs.ErrInvalidArgument)
	}
	return s.create(ctx, r, spec, io)
}

// create is Create of a request that was checked. Its caller ends io after an error.
func (s *Service) create(ctx context.Context, r *guestv1.CreateRequest, spec *specs.Spec, io *stdio.IO) (*guestv1.CreateResponse, error) {
	pidns, err := s.pidNamespace(ctx, r)
	if err != nil {
		return nil, err
	}
	c, err := s.reserve(r.GetId())
	if err != nil {
		return nil, err
	}
	c.sharesPids = pidns != ""
	c.init.io = io
	steps, err := c.create(ctx, r, spec, pidns)
	if err != nil {
		cctx, cancel := detached(ctx, cleanLimit)
		defer cancel()
		err = errors.Join(err, c.destroy(cctx))
		s.forget(c)
		return nil, err
	}
	return &guestv1.CreateResponse{Pid: uint32(c.init.snapshot().pid), Steps: steps}, nil
}

func (s *Service) openIO(r *guestv1.Stdio) (*stdio.IO, error) {
	return stdio.Open(s.cfg.Streams, stdio.Config{
		Stdin: r.GetStdin(), Stdout: r.GetStdout(), Stderr: r.GetStderr(), Terminal: r.GetTerminal(),
	})
}

// checkCreate checks a request as far as that can be done by looking at it, and
// decodes its spec.
func checkCreate(r *guestv1.CreateRequest) (*specs.Spec, error) {
	if err := checkID("container ID", r.GetId()); err != nil {
		return nil, err
	}
	if len(r.GetSpec()) > api.MaxSpecBytes {
		return nil, fmt.Errorf("spec of %d bytes: at most %d: %w", len(r.GetSpec()), api.MaxSpecBytes, errdefs.ErrInvalidArgument)
	}
	spec := &specs.Spec{}
	if err := json.Unmarshal(r.GetSpec(), spec); err != nil {
		return nil, fmt.Errorf("spec: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	if err := errors.Join(checkSpec(spec), checkDisks(r)); err != nil {
		return nil, err
	}
	return spec, nil
}

// pidNamespace returns the path of the PID namespace to join, "" for an own one.
func (s *Service) pidNamespace(ctx context.Context, r *guestv1.CreateRequest) (string, error) {
	switch r.GetPidNamespace() {
	case guestv1.PidNamespace_PID_CONTAINER:
		return "", nil
	case guestv1.PidNamespace_PID_POD:
		return s.podPidNamespace(ctx)
	case guestv1.PidNamespace_PID_TARGET:
		pid := int(r.GetTargetPid())
		if pid <= 1 || !s.owns(pid) {
			return "", fmt.Errorf("target PID namespace: no container has a process %d: %w", pid, errdefs.ErrNotFound)
		}
		return pidNamespace(pid), nil
	default:
		return "", fmt.Errorf("PID namespace %d: %w", r.GetPidNamespace(), errdefs.ErrInvalidArgument)
	}
}

// create makes the bundle and the container, and tells how long its parts took. Its
// caller destroys what a failure leaves.
func (c *container) create(ctx context.Context, r *guestv1.CreateRequest, spec *specs.Spec, pidns string) ([]*guestv1.Step, error) {
	var steps []*guestv1.Step
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"image", func() error {
			return c.s.cfg.RootFS.Image(ctx, r.GetRootfs().GetImageSerial(), c.s.cfg.Namespaces().File())
		}},
		{"rootfs", func() error { return c.mountRootFS(ctx, r) }},
		{"disks", func() error {
			if err := c.mountVolumes(ctx, r.GetVolumes(), spec); err != nil {
				return err
			}
			return c.addDevices(ctx, r.GetDevices(), spec)
		}},
		{"bundle", func() error {
			c.prefetch(spec)
			return c.writeBundle(r, spec, pidns)
		}},
		{"crun create", func() error {
			return c.launch(ctx, c.init, c.bundle, r.GetStdio().GetTerminal(), stateCreated, c.initExited, func(p crun.Process) (int, error) {
				return c.s.cfg.Runtime.Create(ctx, c.id, c.bundle, p)
			})
		}},
	} {
		began := time.Now()
		if err := step.do(); err != nil {
			return nil, err
		}
		steps = append(steps, &guestv1.Step{Name: step.name, Usec: uint64(time.Since(began).Microseconds())})
	}
	return steps, nil
}

// mountRootFS mounts the container's root file system.
func (c *container) mountRootFS(ctx context.Context, r *guestv1.CreateRequest) (err error) {
	if err := os.MkdirAll(c.rootfs(), 0o711); err != nil {
		return fmt.Errorf("make bundle: %w", err)
	}
	c.layer, err = c.s.cfg.RootFS.Mount(ctx, c.id, r.GetRootfs().GetImageSerial(), c.rootfs(), c.s.cfg.Namespaces().File())
	return err
}

// prefetch reads the container's program while crun makes its process.
func (c *container) prefetch(spec *specs.Spec) {
	p := spec.Process
	go rootfs.Prefetch(c.rootfs(), p.Cwd, p.Args, p.Env)
}

// writeBundle writes what crun reads: the spec, made this guest's.
func (c *container) writeBundle(r *guestv1.CreateRequest, spec *specs.Spec, pidns string) error {
	adapt(spec, guest{
		root:       c.rootfs(),
		cgroup:     filepath.Join("/", c.s.cfg.CgroupParent, c.id),
		pidns:      pidns,
		namespaces: c.s.cfg.Namespaces().Spec(),
		terminal:   r.GetStdio().GetTerminal(),
		pod:        c.s.cfg.Pod,
		privateShm: r.GetPrivateShm(),
	})
	if c.s.cfg.Namespaces() != nil {
		var err error
		if spec.Mounts, err = safeMounts(spec.Mounts); err != nil {
			return err
		}
	}
	return writeJSON(filepath.Join(c.bundle, "config.json"), spec)
}

func writeJSON(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode %s: %w", filepath.Base(path), err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		return fmt.Errorf("write %s: %w", filepath.Base(path), err)
	}
	return nil
}
