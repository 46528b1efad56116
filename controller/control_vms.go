// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	ctlv1 "github.com/cloudhv/containerd-cloudhv/controller/ctlapi/v1"
	"github.com/cloudhv/containerd-cloudhv/vmpool"
	"github.com/cloudhv/containerd-cloudhv/vmpool/process"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// States of the pool's VMs in a list; the others are those of sandboxes.
const (
	statePooled = "pooled"
	stateMaking = "making"
)

// consoleChunk is how much of a console log goes into one message, in bytes.
const consoleChunk = 32 << 10

// listedVM is what can be told of a VM without asking anybody.
type listedVM struct {
	answer  *ctlv1.VM
	created time.Time
	// console is the path of its console log.
	console   string
	vmm, shim *process.Identity
}

// listVMs are all VMs: those of pods as they were created, then those of the pool.
func (c *Controller) listVMs() []listedVM {
	var pods, pooled []listedVM
	for _, p := range c.allPods() {
		pods = append(pods, podVM(p))
	}
	if c.pool != nil {
		for _, vm := range c.pool.List() {
			pooled = append(pooled, pooledVM(&vm))
		}
	}
	older := func(a, b listedVM) int { return a.created.Compare(b.created) }
	slices.SortStableFunc(pods, older)
	slices.SortStableFunc(pooled, older)
	return append(pods, pooled...)
}

func podVM(p *pod) listedVM {
	rec := p.snapshot()
	vm := listedVM{created: rec.CreatedAt, console: vmFile(p, &rec, vmm.ConsoleLog), answer: &ctlv1.VM{
		Pod: &ctlv1.Pod{
			Id: rec.ID, ContainerdNamespace: rec.Namespace, Namespace: rec.Pod.Namespace, Name: rec.Pod.Name, Uid: rec.Pod.UID,
		},
		State: string(rec.State), Vcpus: uint32(rec.Size.VCPUs), MemoryBytes: rec.Size.MemoryBytes,
		Created: timestamppb.New(rec.CreatedAt), Snapshot: rec.Snapshot, Cause: valid(rec.Cause),
	}}
	for _, ph := range rec.Phases {
		vm.answer.Phases = append(vm.answer.Phases, &ctlv1.Phase{Name: ph.Name, At: micros(ph.AtUsec), Took: micros(ph.TookUsec)})
	}
	if rec.VM == nil {
		return vm
	}
	vm.answer.Id, vm.answer.Outcome = rec.VM.ID, cmp.Or(rec.Outcome, string(vmpool.Cold))
	if rec.State != StateStopped {
		id := rec.VM.Identity()
		vm.vmm, vm.shim = &id, rec.Shim
	}
	return vm
}

func micros(n int64) *durationpb.Duration { return durationpb.New(time.Duration(n) * time.Microsecond) }

func pooledVM(v *vmpool.PooledVM) listedVM {
	vm := listedVM{created: v.Made, console: filepath.Join(v.Dir, vmm.ConsoleLog), answer: &ctlv1.VM{
		Id: v.ID, State: stateMaking, Vcpus: uint32(v.Size.VCPUs), MemoryBytes: v.Size.MemoryBytes, Snapshot: v.Snapshot,
	}}
	if v.Ready {
		vm.answer.State = statePooled
	}
	if !v.Made.IsZero() {
		vm.answer.Created = timestamppb.New(v.Made)
	}
	if v.VM != nil {
		id := v.VM.Identity()
		vm.vmm = &id
	}
	return vm
}

// List implements ctlv1.ControlServer.
func (s *ControlService) List(ctx context.Context, _ *ctlv1.ListRequest) (*ctlv1.ListResponse, error) {
	answer := &ctlv1.ListResponse{}
	for _, vm := range s.c.listVMs() {
		if ctx.Err() != nil {
			return nil, errgrpc.ToGRPC(context.Cause(ctx))
		}
		vm.answer.VmmPid, vm.answer.VmmPssBytes = measure(vm.vmm)
		vm.answer.ShimPid, vm.answer.ShimPssBytes = measure(vm.shim)
		answer.Vms = append(answer.Vms, vm.answer)
	}
	return answer, nil
}

// measure tells what a process has of memory. One that has ended is none.
func measure(id *process.Identity) (pid uint32, pss int64) {
	if id == nil {
		return 0, 0
	}
	pss, err := id.PSS()
	if errdefs.IsNotFound(err) {
		return 0, 0
	}
	return uint32(id.Pid), pss
}

// findVM finds a VM by its ID, its pod's, or the beginning of either. The name is
// compared with what is known and never part of a path.
func (c *Controller) findVM(id string) (listedVM, error) {
	if id == "" {
		return listedVM{}, fmt.Errorf("no VM was named: %w", errdefs.ErrInvalidArgument)
	}
	var found []listedVM
	for _, vm := range c.listVMs() {
		names := []string{vm.answer.GetId(), vm.answer.GetPod().GetId()}
		if slices.Contains(names, id) {
			return vm, nil
		}
		if strings.HasPrefix(names[0], id) || strings.HasPrefix(names[1], id) {
			found = append(found, vm)
		}
	}
	switch len(found) {
	case 0:
		return listedVM{}, fmt.Errorf("no VM, and no pod, has an ID %q or one that begins so: %w", id, errdefs.ErrNotFound)
	case 1:
		return found[0], nil
	default:
		return listedVM{}, fmt.Errorf("%d VMs have an ID that begins with %q: %w", len(found), id, errdefs.ErrFailedPrecondition)
	}
}

// Console implements ctlv1.ControlServer.
func (s *ControlService) Console(req *ctlv1.ConsoleRequest, stream grpc.ServerStreamingServer[ctlv1.ConsoleResponse]) error {
	vm, err := s.c.findVM(req.GetId())
	if err != nil {
		return errgrpc.ToGRPC(err)
	}
	log, size, closeLog, err := openConsole(vm.console)
	if err != nil {
		return errgrpc.ToGRPC(fmt.Errorf("console of %q: %w", req.GetId(), sentinel(err, errdefs.ErrInternal)))
	}
	defer closeLog()
	if tail := req.GetTailBytes(); tail > 0 && tail < size {
		if _, err := io.CopyN(io.Discard, log, size-tail); err != nil {
			return errgrpc.ToGRPC(sentinel(err, errdefs.ErrInternal))
		}
	}
	if err := stream.Send(&ctlv1.ConsoleResponse{VmId: vm.answer.GetId(), PodId: vm.answer.GetPod().GetId()}); err != nil {
		return err
	}
	buf := make([]byte, consoleChunk)
	for {
		n, err := io.ReadFull(log, buf)
		if n > 0 {
			if err := stream.Send(&ctlv1.ConsoleResponse{Data: buf[:n]}); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return nil
		case err != nil:
			return errgrpc.ToGRPC(sentinel(err, errdefs.ErrInternal))
		}
	}
}

// openConsole opens what a console log holds at this moment: what came before, and
// the current file. Either may be missing.
func openConsole(path string) (log io.Reader, size int64, closeLog func(), err error) {
	for {
		current, err := openRegular(path)
		if err != nil {
			return nil, 0, nil, err
		}
		before, err := openRegular(path + vmm.RotatedSuffix)
		if err != nil {
			return nil, 0, nil, errors.Join(err, current.close())
		}
		if !current.still(path) {
			// It was rotated between the two, and they may not fit together.
			if err := errors.Join(current.close(), before.close()); err != nil {
				return nil, 0, nil, err
			}
			continue
		}
		closeLog = func() { _, _ = current.close(), before.close() } // only read
		return io.MultiReader(before.reader(), current.reader()), before.size() + current.size(), closeLog, nil
	}
}

// part is a file as long as it was when it was opened; without one it is empty.
type part struct {
	file *os.File
	info fs.FileInfo
}

func (p part) size() int64 {
	if p.file == nil {
		return 0
	}
	return p.info.Size()
}

// still is true if the file at path is the one that was opened, or none if none was.
func (p part) still(path string) bool {
	now, err := os.Lstat(path)
	if p.file == nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	return err == nil && os.SameFile(p.info, now)
}

func (p part) reader() io.Reader {
	if p.file == nil {
		return strings.NewReader("")
	}
	return io.LimitReader(p.file, p.size())
}

func (p part) close() error {
	if p.file == nil {
		return nil
	}
	return p.file.Close()
}

// openRegular opens a regular file, by no link. One that is missing is an empty part.
func openRegular(path string) (part, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return part{}, nil
	}
	if err != nil {
		return part{}, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is no regular file: %w", path, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return part{}, errors.Join(err, f.Close())
	}
	return part{file: f, info: info}, nil
}
