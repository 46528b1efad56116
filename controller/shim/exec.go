// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/cloudhv/containerd-cloudhv/controller/shim/guestspec"
	wirev1 "github.com/cloudhv/containerd-cloudhv/controller/shim/wire/v1"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
)

// Exec adds a process to a container, which Start then starts.
func (s *service) Exec(ctx context.Context, r *wirev1.ExecProcessRequest) (_ *emptypb.Empty, retErr error) {
	t, err := s.task(r.Id)
	if err != nil {
		return nil, err
	}
	if err := checkID("exec", r.ExecId); err != nil {
		return nil, err
	}
	if state := t.init.info().state; state != stateRunning {
		return nil, fmt.Errorf("container %q is not running: %w", r.Id, errdefs.ErrFailedPrecondition)
	}
	process, err := execProcess(r)
	if err != nil {
		return nil, err
	}
	if err := t.reserve(r.ExecId); err != nil {
		return nil, err
	}
	defer func() {
		if retErr != nil {
			t.remove(r.ExecId)
		}
	}()
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
	if err := failpoint.At(ctx, failpoint.ExecStreams); err != nil {
		return nil, err
	}
	if err := pio.connect(ctx, s.guest.transport); err != nil {
		return nil, err
	}
	p := newProcess(t, r.ExecId, paths, pio)
	if err := s.execInGuest(ctx, p, process); err != nil {
		return nil, err
	}
	t.add(p)
	s.events.publish(&wirev1.TaskExecAdded{ContainerId: t.id, ExecId: p.execID})
	pio.start(s.ctx)
	s.running.Go(func() { p.watch(s.ctx) })
	return &emptypb.Empty{}, nil
}

// execProcess translates the request's process.
func execProcess(r *wirev1.ExecProcessRequest) ([]byte, error) {
	var host specs.Process
	if err := unmarshalStrict(r.Spec.GetValue(), &host); err != nil {
		return nil, fmt.Errorf("process: %w", err)
	}
	// containerd's own exec goes by the request.
	host.Terminal = r.Terminal
	process, err := guestspec.TranslateProcess(&host)
	if err != nil {
		return nil, fmt.Errorf("process %q of container %q cannot run in a VM: %w", r.ExecId, r.Id, err)
	}
	return marshalSpec(process)
}

// execInGuest adds the process. When it fails, or nobody waits for it any more,
// the guest has none.
func (s *service) execInGuest(ctx context.Context, p *process, process []byte) (retErr error) {
	defer func() {
		if retErr == nil || s.guest.lost() {
			return
		}
		_, err := callGuest(ctx, s.guest, undoLimit, func(ctx context.Context, c guestv1.TaskService) (*guestv1.DeleteResponse, error) {
			return c.Delete(ctx, &guestv1.DeleteRequest{Id: p.task.id, ExecId: p.execID})
		})
		if err != nil && !errdefs.IsNotFound(err) {
			log.G(ctx).WithError(err).WithField("container", p.task.id).WithField("exec", p.execID).
				Warn("a process that failed to be added may be left in the guest")
		}
	}()
	if err := failpoint.At(ctx, failpoint.ExecGuest); err != nil {
		return err
	}
	_, err := callGuest(ctx, s.guest, startLimit, func(ctx context.Context, c guestv1.TaskService) (*emptypb.Empty, error) {
		return c.Exec(ctx, &guestv1.ExecRequest{Id: p.task.id, ExecId: p.execID, Process: process, Stdio: p.io.streams})
	})
	if err != nil {
		return fmt.Errorf("exec %q in container %q: %w", p.execID, p.task.id, err)
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("exec %q in container %q: nobody waits for it any more: %w", p.execID, p.task.id, err)
	}
	return failpoint.At(ctx, failpoint.ExecDone)
}

func decodeStrict(data []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("data after the end of the JSON value")
	}
	return nil
}
