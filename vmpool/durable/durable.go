// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package durable keeps a value in a file, as JSON, so that a reader finds the old
// one or the new one whatever happens in between, a loss of power included.
package durable

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/pkg/atomicfile"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// WriteJSON writes v to the file at path, which only its owner may read. When it
// returns v has reached the disk; after an error the file is as it was, or has v.
func WriteJSON(path string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode %s: %w: %w", filepath.Base(path), err, errdefs.ErrInternal)
	}
	f, err := atomicfile.New(path, 0o600)
	if err != nil {
		return fmt.Errorf("write %s: %w", filepath.Base(path), err)
	}
	if _, err := f.Write(data); err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", filepath.Base(path), err), f.Cancel())
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("write %s: %w", filepath.Base(path), err)
	}
	return SyncDir(filepath.Dir(path))
}

// SyncDir makes the names in a directory durable.
func SyncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	return nil
}

// ReadJSON reads the file at path into v. It returns ErrNotFound if there is none,
// and ErrDataLoss if it cannot be what WriteJSON wrote: no regular file, longer
// than limit bytes, or not v's JSON. After an error v may be half filled in.
func ReadJSON(path string, limit int64, v any) error {
	// A FIFO in its place must not block.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("read %s: %w: %w", filepath.Base(path), err, errdefs.ErrNotFound)
	case errors.Is(err, unix.ELOOP):
		return fmt.Errorf("read %s: %w: %w", filepath.Base(path), err, errdefs.ErrDataLoss)
	case err != nil:
		return fmt.Errorf("read %s: %w", filepath.Base(path), err)
	}
	defer f.Close() //nolint:errcheck // only read
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("read %s: %w", filepath.Base(path), err)
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("%s is no regular file: %w", path, errdefs.ErrDataLoss)
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return fmt.Errorf("read %s: %w", filepath.Base(path), err)
	}
	if int64(len(data)) > limit {
		return fmt.Errorf("%s has more than %d bytes: %w", path, limit, errdefs.ErrDataLoss)
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("%s: %w: %w", path, err, errdefs.ErrDataLoss)
	}
	return nil
}
