// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sync/errgroup"

	hostv1 "github.com/cloudhv/containerd-cloudhv/controller/hostapi/v1"
	"github.com/cloudhv/containerd-cloudhv/controller/shim/guestspec"
	wirev1 "github.com/cloudhv/containerd-cloudhv/controller/shim/wire/v1"
	"github.com/cloudhv/containerd-cloudhv/guest/api"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
)

// maxHostSpecBytes bounds a config.json: what is left of it for the guest is
// smaller, at most api.MaxSpecBytes.
const maxHostSpecBytes = 4 << 20

// undoLimit is how long the undoing of a failed create may take.
const undoLimit = 30 * time.Second

// Create makes a container in the guest. After a failure nothing of it is left,
// and its ID may be used again.
func (s *service) Create(ctx context.Context, r *wirev1.CreateTaskRequest) (_ *wirev1.CreateTaskResponse, retErr error) {
	if err := checkID("container", r.Id); err != nil {
		return nil, err
	}
	rep := s.newReport("create", r.Id)
	defer func() { rep.send(ctx, retErr) }()
	if r.Checkpoint != "" || r.ParentCheckpoint != "" {
		return nil, fmt.Errorf("container %q cannot be restored from checkpoint %q in a VM: %w", r.Id, r.Checkpoint, errdefs.ErrInvalidArgument)
	}
	if err := s.reserve(r.Id); err != nil {
		return nil, err
	}
	defer func() {
		if retErr != nil {
			s.forget(ctx, r.Id)
		}
	}()
	req, err := s.guestCreate(ctx, r)
	if err != nil {
		return nil, err
	}
	paths := stdioPaths{stdin: r.Stdin, stdout: r.Stdout, stderr: r.Stderr, terminal: r.Terminal}
	pio, err := openIO(paths)
	if err != nil {
		return nil, err
	}
	defer func() {
		if retErr != nil {
			pio.cut()
		}
	}()
	if err := s.prepare(ctx, req, pio, rep); err != nil {
		return nil, err
	}
	req.Stdio = pio.streams
	t := &task{svc: s, id: r.Id, bundle: r.Bundle}
	t.init = newProcess(t, "", paths, pio)
	if err := s.createInGuest(ctx, t, req, rep); err != nil {
		return nil, err
	}
	s.admit(t, r)
	return &wirev1.CreateTaskResponse{Pid: t.init.pid}, nil
}

// reserve takes a container ID.
func (s *service) reserve(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.tasks[id]; ok {
		return fmt.Errorf("container %q: %w", id, errdefs.ErrAlreadyExists)
	}
	s.tasks[id] = nil
	return nil
}

func (s *service) forget(ctx context.Context, id string) {
	s.detachDisks(ctx, id)
	s.volumes.remove(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.tasks, id)
	s.sizer.set(id, nil)
}

// guestCreate translates the bundle's spec. Root file system and streams are
// still missing.
func (s *service) guestCreate(ctx context.Context, r *wirev1.CreateTaskRequest) (*guestv1.CreateRequest, error) {
	host, err := readSpec(filepath.Join(r.Bundle, "config.json"))
	if err != nil {
		return nil, err
	}
	if s.guest.lost() || ofEndedPod(host) {
		return nil, fmt.Errorf("container %q: %w", r.Id, errVMLost)
	}
	c, err := guestspec.Translate(host, r.Id, guestspec.Pod{SandboxPid: s.cfg.SandboxPid, IsTask: s.hasPid})
	if err != nil {
		return nil, err
	}
	if c.Spec.Process.Terminal != r.Terminal {
		return nil, fmt.Errorf("container %q: process.terminal is %t, and the request says %t: want the same: %w",
			r.Id, c.Spec.Process.Terminal, r.Terminal, errdefs.ErrInvalidArgument)
	}
	s.sizer.set(r.Id, limitsOf(r.Id, c.Spec.Linux.Resources, s.sizer.get(r.Id)))
	if err := failpoint.At(ctx, failpoint.TaskCreateVolumes); err != nil {
		return nil, err
	}
	if err := s.addMounts(r.Id, c); err != nil {
		return nil, fmt.Errorf("container %q cannot run in a VM: %w", r.Id, err)
	}
	spec, err := marshalSpec(c.Spec)
	if err != nil {
		return nil, err
	}
	return &guestv1.CreateRequest{
		Id:           r.Id,
		Spec:         spec,
		PidNamespace: c.PidNamespace,
		TargetPid:    c.TargetPid,
		PrivateShm:   c.PrivateShm,
	}, nil
}

// ofEndedPod tells a spec that CRI made after the pod's end: the pod's pid is 0
// then, and so it is in the paths of its namespaces.
func ofEndedPod(spec *specs.Spec) bool {
	return spec.Linux != nil && slices.ContainsFunc(spec.Linux.Namespaces, func(ns specs.LinuxNamespace) bool {
		return strings.HasPrefix(ns.Path, "/proc/0/ns/")
	})
}

// readSpec reads an OCI spec; a field that its version here does not have is an
// error, as it would get lost.
func readSpec(path string) (*specs.Spec, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read spec: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxHostSpecBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read spec: %w", err)
	}
	if len(data) > maxHostSpecBytes {
		return nil, fmt.Errorf("spec has more than %d bytes: %w", maxHostSpecBytes, errdefs.ErrInvalidArgument)
	}
	var spec specs.Spec
	if err := unmarshalStrict(data, &spec); err != nil {
		return nil, fmt.Errorf("spec: %w", err)
	}
	return &spec, nil
}

// prepare prepares the VM for a container, and completes its request; meanwhile, it
// connects the streams.
func (s *service) prepare(ctx context.Context, req *guestv1.CreateRequest, pio *processIO, rep *report) error {
	g, gctx := errgroup.WithContext(ctx)
	end := rep.part(PartImage)
	g.Go(func() (err error) {
		defer end()
		req.Rootfs, err = s.prepareVM(gctx, req.Id)
		return err
	})
	g.Go(func() error { return s.connectIO(gctx, pio, rep) })
	g.Go(func() error { return s.volumes.mount(gctx, req.Id, s.guest) })
	g.Go(func() error { return s.attachDisks(gctx, req.Id, req) })
	began := time.Now()
	if err := g.Wait(); err != nil {
		return err
	}
	if time.Since(began) < s.streamAge {
		return nil
	}
	// The image had to be made first, and that took long.
	return s.connectIO(ctx, pio, rep)
}

// connectIO connects streams, when the agent is there.
func (s *service) connectIO(ctx context.Context, pio *processIO, rep *report) error {
	end := rep.part(PartConnect)
	_, err := s.guest.client(ctx)
	end()
	if err != nil {
		return err
	}
	defer rep.part(PartStreams)()
	if err := failpoint.At(ctx, failpoint.TaskCreateStreams); err != nil {
		return err
	}
	return pio.connect(ctx, s.guest.transport)
}

// prepareVM has the container's image made a disk of the VM and, at the same time,
// the VM made large enough for the container.
func (s *service) prepareVM(ctx context.Context, id string) (*guestv1.RootFS, error) {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.growVM(ctx) })
	var rootfs *guestv1.RootFS
	g.Go(func() (err error) {
		rootfs, err = s.attachRootFS(ctx, id)
		return err
	})
	err := g.Wait()
	return rootfs, err
}

// attachRootFS asks the plugin for the container's image as a disk of the VM.
func (s *service) attachRootFS(ctx context.Context, id string) (*guestv1.RootFS, error) {
	if err := failpoint.At(ctx, failpoint.TaskCreateAttach); err != nil {
		return nil, err
	}
	var serial string
	err := s.askHost(ctx, func(ctx context.Context, host hostv1.HostService) error {
		resp, err := host.AttachRootFS(ctx, &hostv1.AttachRootFSRequest{SandboxId: s.cfg.SandboxID, ContainerId: id})
		if err == nil {
			serial = resp.ImageSerial
		}
		return err
	})
	if errors.Is(err, errVMLost) {
		return nil, err
	}
	if err != nil {
		return nil, fmt.Errorf("attach root file system of container %q: %w", id, err)
	}
	return &guestv1.RootFS{ImageSerial: serial}, nil
}

// createInGuest makes the container. When it fails, or nobody waits for it any
// more, the guest has none.
func (s *service) createInGuest(ctx context.Context, t *task, req *guestv1.CreateRequest, rep *report) (retErr error) {
	defer func() {
		if retErr == nil || s.guest.lost() {
			return
		}
		_, err := callGuest(ctx, s.guest, undoLimit, func(ctx context.Context, c guestv1.TaskService) (*guestv1.DeleteResponse, error) {
			return c.Delete(ctx, &guestv1.DeleteRequest{Id: req.Id})
		})
		if err != nil && !errdefs.IsNotFound(err) {
			log.G(ctx).WithError(err).WithField("container", req.Id).Warn("a container that failed to be created may be left in the guest")
		}
	}()
	end := rep.part(PartGuest)
	if err := failpoint.At(ctx, failpoint.TaskCreateGuest); err != nil {
		return err
	}
	resp, err := callGuest(ctx, s.guest, createLimit, func(ctx context.Context, c guestv1.TaskService) (*guestv1.CreateResponse, error) {
		return c.Create(ctx, req)
	})
	end()
	if err != nil {
		return fmt.Errorf("create container %q: %w", req.Id, err)
	}
	rep.steps(resp.Steps)
	if err := checkPid(resp.Pid); err != nil {
		return fmt.Errorf("create container %q: %w", req.Id, err)
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("create container %q: nobody waits for it any more: %w", req.Id, err)
	}
	t.init.pid = resp.Pid
	return failpoint.At(ctx, failpoint.TaskCreateDone)
}

// admit makes a created container known, to containerd and to this service.
func (s *service) admit(t *task, r *wirev1.CreateTaskRequest) {
	// The exit cannot be told before the creation.
	t.init.order.Lock()
	defer t.init.order.Unlock()
	s.mu.Lock()
	s.tasks[t.id] = t
	s.mu.Unlock()
	s.events.publish(&wirev1.TaskCreate{
		ContainerId: t.id,
		Bundle:      r.Bundle,
		Rootfs:      r.Rootfs,
		Io:          &wirev1.TaskIO{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal},
		Pid:         t.init.pid,
	})
	t.init.io.start(s.ctx)
	s.running.Go(func() { t.init.watch(s.ctx) })
	s.quiet()
}

// unmarshalStrict decodes JSON and refuses fields that v does not have.
func unmarshalStrict(data []byte, v any) error {
	if err := decodeStrict(data, v); err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return nil
}

func marshalSpec(v any) ([]byte, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode spec: %w", errors.Join(err, errdefs.ErrInvalidArgument))
	}
	if len(data) > api.MaxSpecBytes {
		return nil, fmt.Errorf("the guest's spec has %d bytes: want at most %d: %w", len(data), api.MaxSpecBytes, errdefs.ErrInvalidArgument)
	}
	return data, nil
}
