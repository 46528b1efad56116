// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	shimapi "github.com/cloudhv/containerd-cloudhv/controller/shim"
	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
	"github.com/cloudhv/containerd-cloudhv/vmpool/process"
)

const (
	// shimGrace is how long a shim may take to end when asked.
	shimGrace = 2 * time.Second
	// taskAPIVersion is that of the Task API which shims serve.
	taskAPIVersion = 3
	// maxLoss bounds what is read of a shim's reason, in bytes.
	maxLoss = 1024
)

// shim is a running shim process.
type shim struct {
	id     process.Identity
	handle *process.Handle
}

// done is closed when the process has ended.
func (s *shim) done() <-chan struct{} {
	return s.handle.Done()
}

// shimBinary finds the shim's program: as configured, or beside this
// process's own, or on PATH.
func shimBinary(name string) (string, error) {
	if filepath.IsAbs(name) {
		return name, nil
	}
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), name)
		if st, err := os.Stat(beside); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return beside, nil
		}
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("find the shim: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	return path, nil
}

// startShim starts a pod's shim, whose socket is listening before, and gives it the
// listeners of the pod's port-forwards, which the caller closes. The process is a
// session of its own and outlives containerd. After an error no process is left.
func startShim(ctx context.Context, p *pod, program string, cfg shimapi.Config, forwards []*os.File) (_ *shim, retErr error) {
	cfg.Forwards = len(forwards)
	data, err := json.Marshal(cfg)
	if err != nil {
		return nil, fmt.Errorf("encode shim configuration: %w", err)
	}
	if err := failpoint.At(ctx, failpoint.StartShimConfig); err != nil {
		return nil, err
	}
	if err := os.WriteFile(p.file(shimapi.ConfigFile), data, 0o600); err != nil {
		return nil, fmt.Errorf("write shim configuration: %w", err)
	}
	if err := failpoint.At(ctx, failpoint.StartShimSocket); err != nil {
		return nil, err
	}
	socket, err := listenFile(p.file(shimapi.SocketFile))
	if err != nil {
		return nil, err
	}
	defer socket.Close()
	if err := failpoint.At(ctx, failpoint.StartShimLog); err != nil {
		return nil, err
	}
	logFile, err := os.OpenFile(p.file(shimapi.LogFile), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open shim log: %w", err)
	}
	defer logFile.Close()

	cmd := exec.Command(program, "-sandbox", p.dir)
	// The runtime reads GOMAXPROCS before main; the shim's tune.go says why one.
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "GOMAXPROCS=1"}, failpoint.Env()...)
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.ExtraFiles = append([]*os.File{socket}, forwards...) // from shimapi.ListenFD on
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := failpoint.At(ctx, failpoint.StartShim); err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start shim: %w: %w", err, errdefs.ErrFailedPrecondition)
	}
	resetOOMScore(ctx, cmd.Process.Pid)
	s, err := holdShim(cmd)
	if err != nil {
		return nil, err
	}
	return s, nil
}

// holdShim takes hold of a child that was started. As long as it is not waited
// for, its pid stays its own.
func holdShim(cmd *exec.Cmd) (*shim, error) {
	id, err := process.Identify(cmd.Process.Pid)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("shim ended at once: %w", err), cmd.Process.Kill(), reap(cmd))
	}
	h, err := id.Open()
	if err != nil {
		return nil, errors.Join(err, cmd.Process.Kill(), reap(cmd))
	}
	go func() { _ = cmd.Wait() }()
	return &shim{id: id, handle: h}, nil
}

// reap waits for a killed child; how it ended is no news.
func reap(cmd *exec.Cmd) error {
	err := cmd.Wait()
	if _, ok := errors.AsType[*exec.ExitError](err); ok {
		return nil
	}
	return err
}

// adoptShim takes hold of a shim that an earlier containerd started, or
// returns ErrNotFound if it has ended.
func adoptShim(id process.Identity) (*shim, error) {
	h, err := id.Open()
	if err != nil {
		return nil, err
	}
	return &shim{id: id, handle: h}, nil
}

// end ends the process and waits for it.
func (s *shim) end(ctx context.Context) error {
	if err := s.handle.End(ctx, shimGrace); err != nil {
		return fmt.Errorf("shim %d: %w", s.id.Pid, err)
	}
	s.handle.Close()
	return nil
}

// endShim ends s or, if nobody has hold of it, the shim that was recorded.
func endShim(ctx context.Context, s *shim, recorded *process.Identity) error {
	if s == nil && recorded != nil {
		var err error
		if s, err = adoptShim(*recorded); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	if s == nil {
		return nil
	}
	return s.end(ctx)
}

// listenFile makes a listening unix socket and gives its file.
func listenFile(path string) (*os.File, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove stale socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	f, err := l.File()
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return f, nil
}

// resetOOMScore takes back the score that a service manager gave containerd
// and that its children inherit. A process without CAP_SYS_RESOURCE may not
// lower it, which is no failure.
func resetOOMScore(ctx context.Context, pid int) {
	path := filepath.Join("/proc", strconv.Itoa(pid), "oom_score_adj")
	if err := os.WriteFile(path, []byte("0"), 0o644); err != nil {
		log.G(ctx).WithError(err).WithField("pid", pid).Warn("cannot reset the OOM score of a shim")
	}
}

// loss is why the shim gave up the guest, or "" if it did not: printable, and of at
// most maxLoss bytes.
func (p *pod) loss() (string, error) {
	f, err := os.Open(p.file(shimapi.VMLostFile))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read why the guest was lost: %w: %w", err, errdefs.ErrInternal)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxLoss))
	if err != nil {
		return "", fmt.Errorf("read why the guest was lost: %w: %w", err, errdefs.ErrInternal)
	}
	return printable(strings.TrimSpace(string(data)), maxLoss), nil
}

// taskAddress is where a sandbox's shim serves the Task API.
func taskAddress(p *pod) string {
	return "ttrpc+unix://" + p.file(shimapi.SocketFile)
}
