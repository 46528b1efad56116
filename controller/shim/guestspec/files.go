// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package guestspec

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/api"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// ReadFiles reads the sources of bind mounts: regular files of at most
// api.MaxFileBytes, api.MaxFilesBytes together. The container gets copies. The
// error names every bind mount that is refused, with its source, and is an
// errdefs.ErrInvalidArgument.
func ReadFiles(binds []Bind) ([]*guestv1.File, error) {
	var (
		out     []*guestv1.File
		refused []error
		total   int
	)
	for _, b := range binds {
		f, err := readFile(b)
		if err != nil {
			refused = append(refused, fmt.Errorf("mount %q of %q: %w", b.Destination, b.Source, err))
			continue
		}
		total += len(f.Data)
		if total > api.MaxFilesBytes {
			refused = append(refused, fmt.Errorf("mount %q of %q: all such files together have more than %d bytes: %w",
				b.Destination, b.Source, api.MaxFilesBytes, errdefs.ErrInvalidArgument))
			break
		}
		out = append(out, f)
	}
	if len(refused) > 0 {
		return nil, errors.Join(refused...)
	}
	return out, nil
}

func readFile(b Bind) (*guestv1.File, error) {
	st, f, err := openRegular(b.Source)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, api.MaxFileBytes+1))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(data) > api.MaxFileBytes {
		return nil, fmt.Errorf("the file has more than %d bytes: %w", api.MaxFileBytes, errdefs.ErrInvalidArgument)
	}
	return &guestv1.File{
		Destination: b.Destination,
		Data:        data,
		Mode:        st.Mode & 0o777,
		Uid:         st.Uid,
		Gid:         st.Gid,
		Readonly:    b.Readonly,
	}, nil
}

// openRegular opens a file after it has seen that it is a regular one: opening
// a device, a FIFO or a socket can block or do worse.
func openRegular(source string) (*unix.Stat_t, *os.File, error) {
	name, err := filepath.EvalSymlinks(source)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	fd, err := unix.Open(name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", &fs.PathError{Op: "open", Path: name, Err: err}, errdefs.ErrInvalidArgument)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", &fs.PathError{Op: "stat", Path: name, Err: err}, errdefs.ErrInvalidArgument)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, nil, fmt.Errorf("it is %s: want a regular file of at most %d bytes, as volumes are not carried into a VM yet: %w",
			fileKind(st.Mode), api.MaxFileBytes, errdefs.ErrInvalidArgument)
	}
	f, err := os.OpenFile("/proc/self/fd/"+strconv.Itoa(fd), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return &st, f, nil
}

func fileKind(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return "a directory"
	case unix.S_IFSOCK:
		return "a socket"
	case unix.S_IFIFO:
		return "a FIFO"
	case unix.S_IFBLK:
		return "a block device"
	case unix.S_IFCHR:
		return "a character device"
	}
	return "no regular file"
}
