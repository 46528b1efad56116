// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package sparse copies and hashes disk images, whose holes cost nothing.
package sparse

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// block is the unit in which zeros are looked for, in bytes.
const block = 4 << 10

// Copy makes the empty file dst equal to src, sharing blocks where the file
// system can, and else without filling holes.
func Copy(dst, src *os.File) error {
	if err := unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())); err == nil {
		return nil
	}
	st, err := src.Stat()
	if err != nil {
		return fmt.Errorf("copy %s: %w", src.Name(), err)
	}
	if err := dst.Truncate(st.Size()); err != nil {
		return fmt.Errorf("copy %s: %w", src.Name(), err)
	}
	return extents(src, st.Size(), func(data *io.SectionReader, at int64) error {
		if _, err := io.Copy(io.NewOffsetWriter(dst, at), data); err != nil {
			return fmt.Errorf("copy %s: %w", src.Name(), err)
		}
		return nil
	})
}

// CopyFile is Copy to a new file at path, of which nothing is left after an error.
func CopyFile(path, from string) (retErr error) {
	src, err := os.Open(from)
	if err != nil {
		return fmt.Errorf("copy disk: %w", err)
	}
	defer src.Close() //nolint:errcheck // only read
	dst, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("copy disk: %w", err)
	}
	defer func() {
		if err := dst.Close(); err != nil && retErr == nil {
			retErr = fmt.Errorf("copy disk: %w", err)
		}
		if retErr != nil {
			_ = os.Remove(path)
		}
	}()
	return Copy(dst, src)
}

// Hash is the SHA-256 of a file's size and of its blocks that are not all zeros,
// each with its place, in hexadecimal. It does not depend on where holes are.
func Hash(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("hash: %w", err)
	}
	defer f.Close() //nolint:errcheck // only read
	st, err := f.Stat()
	if err != nil {
		return "", fmt.Errorf("hash %s: %w", path, err)
	}
	h := sha256.New()
	put := func(n int64) { _, _ = h.Write(binary.BigEndian.AppendUint64(nil, uint64(n))) }
	put(st.Size())
	buf, zeros := make([]byte, 256*block), make([]byte, block)
	err = extents(f, st.Size(), func(data *io.SectionReader, at int64) error {
		for {
			n, err := io.ReadFull(data, buf)
			for i := 0; i < n; i += block {
				if b := buf[i:min(i+block, n)]; !bytes.Equal(b, zeros[:len(b)]) {
					put(at + int64(i))
					_, _ = h.Write(b)
				}
			}
			at += int64(n)
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				return nil
			}
			if err != nil {
				return fmt.Errorf("hash %s: %w", path, err)
			}
		}
	})
	if err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// extents calls do for each range of f that is no hole, from the start to the
// end, rounded to whole blocks.
func extents(f *os.File, size int64, do func(data *io.SectionReader, at int64) error) error {
	for at := int64(0); at < size; {
		data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // only a hole is left
		}
		if err != nil {
			return fmt.Errorf("find data in %s: %w", f.Name(), err)
		}
		hole, err := unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return fmt.Errorf("find a hole in %s: %w", f.Name(), err)
		}
		data = max(at, data/block*block)
		hole = min(size, (hole+block-1)/block*block)
		if err := do(io.NewSectionReader(f, data, hole-data), data); err != nil {
			return err
		}
		at = hole
	}
	return nil
}
