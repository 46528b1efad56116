// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
	"github.com/cloudhv/containerd-cloudhv/vmpool/sparse"
	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

const (
	scratchDir = "scratch"
	// templatePrefix begins the name of the disk that all are copies of; it ends
	// in the version of how it is made, and its size.
	templatePrefix = "template-v2-"
	scratchSuffix  = ".img"
	mkfsTimeout    = 2 * time.Minute
)

// scratchStore makes the writable disks of VMs: sparse copies of a template
// that holds an empty ext4.
type scratchStore struct {
	dir  string
	size int64
	mu   sync.Mutex
}

func newScratchStore(cacheDir string, size int64) *scratchStore {
	return &scratchStore{dir: filepath.Join(cacheDir, scratchDir), size: size}
}

// path is where the disk of a sandbox lies.
func (s *scratchStore) path(id string) string {
	return filepath.Join(s.dir, id+scratchSuffix)
}

func (s *scratchStore) templatePath() string {
	return filepath.Join(s.dir, templatePrefix+strconv.FormatInt(s.size, 10))
}

// make makes the disk at path. After an error there is none.
func (s *scratchStore) make(ctx context.Context, path string) error {
	if err := s.template(ctx); err != nil {
		return err
	}
	if err := sparse.CopyFile(path, s.templatePath()); err != nil {
		return fmt.Errorf("make scratch disk: %w", err)
	}
	return nil
}

// template makes the template unless there is one of the right size.
func (s *scratchStore) template(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	path := s.templatePath()
	if _, err := os.Stat(path); err == nil {
		return nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("find scratch template: %w", err)
	}
	// A VMM that is no root goes through it to its own disk.
	err := os.MkdirAll(s.dir, 0o711)
	if err == nil {
		err = os.Chmod(s.dir, 0o711)
	}
	if err != nil {
		return fmt.Errorf("make scratch directory: %w", err)
	}
	// Detached: the next pod needs it also if this one's caller leaves.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), mkfsTimeout)
	defer cancel()
	return s.makeTemplate(ctx, path)
}

func (s *scratchStore) makeTemplate(ctx context.Context, path string) (retErr error) {
	tmp, err := os.CreateTemp(s.dir, ".template-")
	if err != nil {
		return fmt.Errorf("make scratch template: %w", err)
	}
	defer func() {
		_ = tmp.Close()
		if retErr != nil {
			_ = os.Remove(tmp.Name())
		}
	}()
	if err := tmp.Truncate(s.size); err != nil {
		return fmt.Errorf("make scratch template: %w", err)
	}
	// No journal: the disk never outlives its VM. The file is all zeros, which
	// discard tells mkfs, so neither it nor the guest writes inode tables. Project
	// quotas tell the guest's agent what each container has written; they need
	// inodes of 256 bytes.
	cmd := exec.CommandContext(ctx, "mkfs.ext4", "-q", "-F", "-m", "0", "-I", "256",
		"-O", "^has_journal,^resize_inode,quota,project",
		"-E", "discard,lazy_itable_init=0,root_owner=0:0,quotatype=prjquota", "-L", "scratch", tmp.Name())
	cmd.Env = []string{"LC_ALL=C", "PATH=" + os.Getenv("PATH") + ":/usr/sbin:/sbin"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("make scratch template: mkfs.ext4: %w: %s: %w",
			err, printable(string(out), maxGuestError), errdefs.ErrFailedPrecondition)
	}
	if err := tmp.Sync(); err != nil {
		return fmt.Errorf("make scratch template: %w", err)
	}
	if err := os.Rename(tmp.Name(), path); err != nil {
		return fmt.Errorf("make scratch template: %w", err)
	}
	return nil
}

// removeScratch removes the disk of a sandbox that has ended.
func (c *Controller) removeScratch(ctx context.Context, path string) error {
	if err := failpoint.At(ctx, failpoint.EndScratch); err != nil {
		return err
	}
	return removeScratch(path)
}

// removeScratch removes a disk; one that is gone is no error.
func removeScratch(path string) error {
	if path == "" {
		return nil
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove scratch disk: %w", err)
	}
	if err := os.RemoveAll(vmm.DisksDir(path)); err != nil {
		return fmt.Errorf("remove what is beside a scratch disk: %w", err)
	}
	return nil
}
