// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// pieceBytes are read or written at a time, where nothing else is said.
const pieceBytes = 1 << 20

// filebench measures a file system, in a directory that it may write to: a file of so many
// MiB, and so many small files.
func filebench(args []string) (int, error) {
	if len(args) != 3 {
		return 64, errors.New("want a directory, MiB and a number of files")
	}
	mib, err := strconv.Atoi(args[1])
	if err != nil {
		return 64, err
	}
	many, err := strconv.Atoi(args[2])
	if err != nil {
		return 64, err
	}
	return 0, measureFiles(os.Stdout, args[0], mib, many)
}

// measureFiles prints lines of a name, a number and "MiB/s" or "/s". What is written has
// reached the disk, but for create's.
func measureFiles(w io.Writer, dir string, mib, many int) error {
	big := filepath.Join(dir, "big")
	each := func(f func(path string) error) func() error {
		return func() error {
			for i := range many {
				if err := f(filepath.Join(dir, "small"+strconv.Itoa(i))); err != nil {
					return err
				}
			}
			return nil
		}
	}
	for _, m := range []struct {
		name string
		run  func() error
		n    int
		unit string
	}{
		{"write", func() error { return writeBig(big, mib<<20, pieceBytes) }, mib, "MiB/s"},
		{"read", func() error { return readBig(big, pieceBytes) }, mib, "MiB/s"},
		{"write_4k", func() error { return writeBig(big, mib<<16, 4<<10) }, mib << 16 / (4 << 10), "/s"},
		{"read_4k", func() error { return readBig(big, 4<<10) }, mib << 16 / (4 << 10), "/s"},
		{"create", each(func(p string) error { return os.WriteFile(p, make([]byte, 1<<10), 0o644) }), many, "/s"},
		{"stat", each(func(p string) error { _, err := os.Stat(p); return err }), many, "/s"},
		{"open_read", each(func(p string) error { _, err := os.ReadFile(p); return err }), many, "/s"},
		{"fsync", each(func(p string) error { return writeBig(p, 1<<10, 1<<10) }), many, "/s"},
		{"remove", each(os.Remove), many, "/s"},
	} {
		if err := printRate(w, m.name, float64(m.n), m.unit, m.run); err != nil {
			return err
		}
	}
	return os.Remove(big)
}

// readbench measures how a file is read that nobody may have read before.
func readbench(args []string) (int, error) {
	if len(args) != 1 {
		return 64, errors.New("want a file")
	}
	return 0, measureRead(os.Stdout, args[0])
}

func measureRead(w io.Writer, path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	return printRate(w, "read", float64(info.Size())/(1<<20), "MiB/s", func() error { return readBig(path, pieceBytes) })
}

// printRate runs it, and prints how much of n was done in a second.
func printRate(w io.Writer, name string, n float64, unit string, run func() error) error {
	began := time.Now()
	if err := run(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	_, err := fmt.Fprintf(w, "%s %.2f %s\n", name, n/time.Since(began).Seconds(), unit)
	return err
}

// writeBig writes a file, which has reached the disk when it returns.
func writeBig(path string, size, piece int) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := buffer(piece)
	for ; size > 0; size -= piece {
		if _, err := f.Write(buf); err != nil {
			return err
		}
	}
	return errors.Join(f.Sync(), f.Close())
}

func readBig(path string, piece int) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, buffer(piece))
	return err
}

// buffer is one page away from a multiple of a mebibyte, where Go begins large ones. A file's pages
// may begin there too, and two pages of which each byte is copied to the other's are then at the
// same place of an emulated processor's TLB: 17 MiB/s instead of 240 in QEMU's software emulation.
func buffer(size int) []byte {
	page := os.Getpagesize()
	return make([]byte, size+page)[page:]
}
