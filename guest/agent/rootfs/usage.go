// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package rootfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// walkEntries and walkTime bound a walk of a writable layer.
	walkEntries = 200_000
	walkTime    = 2 * time.Second
	// A walk's result is good for usageAge, or for usageShare times as long as
	// the walk took if that is longer: counting never takes more than a twentieth
	// of a processor.
	usageAge   = 10 * time.Second
	usageShare = 20
)

// Usage is what a writable layer takes.
type Usage struct {
	Bytes, Inodes uint64
}

// usageCache keeps the result of a walk.
type usageCache struct {
	mu    sync.Mutex
	last  Usage
	until time.Time
}

// Usage tells what the container's writable layer takes on the disk. With
// project quotas the file system knows that. Without, the layer is walked, at
// most so often and so far; a layer with more than walkEntries files is then
// shown too small, never too large.
func (l *Layer) Usage() (Usage, error) {
	if l.project != 0 {
		return quotaUsage(l.m.cfg.Layers, l.project)
	}
	l.usage.mu.Lock()
	defer l.usage.mu.Unlock()
	began := time.Now()
	if began.Before(l.usage.until) {
		return l.usage.last, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), walkTime)
	defer cancel()
	u, err := walk(ctx, l.upper(), walkEntries)
	if err != nil {
		return Usage{}, fmt.Errorf("measure writable layer: %w", err)
	}
	took := time.Since(began)
	l.usage.last, l.usage.until = u, began.Add(max(usageAge, usageShare*took))
	return u, nil
}

// walk adds up the blocks and inodes below dir, each inode once.
func walk(ctx context.Context, dir string, limit int) (Usage, error) {
	var u Usage
	linked := make(map[uint64]struct{})
	var visit func(dir string) error
	visit = func(dir string) error {
		f, err := os.Open(dir)
		if err != nil {
			return err
		}
		defer f.Close()
		for {
			names, err := f.Readdirnames(256)
			for _, name := range names {
				if int(u.Inodes) >= limit || ctx.Err() != nil {
					return nil
				}
				if err := add(&u, linked, filepath.Join(dir, name), visit); err != nil {
					return err
				}
			}
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
		}
	}
	err := visit(dir)
	return u, err
}

// add counts one path, and below it if it is a directory. What has gone
// meanwhile counts nothing.
func add(u *Usage, linked map[uint64]struct{}, path string, visit func(string) error) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return fmt.Errorf("%s: %w", path, err)
	}
	dir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	if st.Nlink > 1 && !dir {
		if _, seen := linked[st.Ino]; seen {
			return nil
		}
		linked[st.Ino] = struct{}{}
	}
	u.Bytes += uint64(st.Blocks) * 512
	u.Inodes++
	if !dir {
		return nil
	}
	if err := visit(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// fsxattr is the kernel's struct fsxattr.
type fsxattr struct {
	xflags, extsize, nextents, projid, cowextsize uint32
	pad                                           [8]byte
}

const (
	fsIocFsGetXattr    = 0x801c581f
	fsIocFsSetXattr    = 0x401c5820
	fsXflagProjInherit = 0x200
	prjQuota           = 2
	qGetQuota          = 0x800007
	quotaCmd           = qGetQuota<<8 | prjQuota
)

// ifDqblk is the kernel's struct if_dqblk.
type ifDqblk struct {
	bhardlimit, bsoftlimit, curspace  uint64
	ihardlimit, isoftlimit, curinodes uint64
	btime, itime                      uint64
	valid                             uint32
	_                                 uint32
}

// setProject gives an empty directory, and all that will be in it, a project ID.
func setProject(dir string, project uint32) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	var a fsxattr
	if err := ioctl(f, fsIocFsGetXattr, unsafe.Pointer(&a)); err != nil {
		return fmt.Errorf("read attributes of %s: %w", dir, err)
	}
	a.projid = project
	a.xflags |= fsXflagProjInherit
	if err := ioctl(f, fsIocFsSetXattr, unsafe.Pointer(&a)); err != nil {
		return fmt.Errorf("set project of %s: %w", dir, err)
	}
	return nil
}

func ioctl(f *os.File, req uintptr, arg unsafe.Pointer) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), req, uintptr(arg))
	if errno != 0 {
		return errno
	}
	return nil
}

// quotaUsage asks the file system of dir what a project takes.
func quotaUsage(dir string, project uint32) (Usage, error) {
	f, err := os.Open(dir)
	if err != nil {
		return Usage{}, fmt.Errorf("measure writable layer: %w", err)
	}
	defer f.Close()
	var q ifDqblk
	_, _, errno := unix.Syscall6(unix.SYS_QUOTACTL_FD, f.Fd(), quotaCmd, uintptr(project), uintptr(unsafe.Pointer(&q)), 0, 0)
	if errno != 0 {
		return Usage{}, fmt.Errorf("measure writable layer by quota: %w", errno)
	}
	return Usage{Bytes: q.curspace, Inodes: q.curinodes}, nil
}
