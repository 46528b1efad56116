// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package rootfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Create builds an image at path, in place of what was there. The new image is complete before it takes
// the name: a VM that starts meanwhile sees the old one or the new one. It returns the regular files in
// the image and its size in bytes, also with ErrTooLarge, in which case path is left as it was.
func Create(path string, in Inputs) (_ []Entry, _ int64, retErr error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return nil, 0, fmt.Errorf("create guest image: %w", err)
	}
	defer func() {
		if retErr != nil {
			retErr = errors.Join(retErr, os.Remove(f.Name()))
		}
	}()
	entries, size, err := buildInto(f, in)
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	if err := errors.Join(f.Chmod(0o644), f.Sync(), f.Close()); err != nil {
		return nil, 0, fmt.Errorf("create guest image: %w", err)
	}
	if size > MaxSize {
		return entries, size, fmt.Errorf("%w: %d bytes, %d allowed", ErrTooLarge, size, MaxSize)
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return nil, 0, fmt.Errorf("create guest image: %w", err)
	}
	return entries, size, nil
}

func buildInto(f *os.File, in Inputs) ([]Entry, int64, error) {
	entries, err := Build(f, in)
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, 0, fmt.Errorf("create guest image: %w", err)
	}
	return entries, info.Size(), nil
}
