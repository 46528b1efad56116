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

// filebench measures a file system, in a directory that it may write to: a file of so many
// MiB, and so many small files.
func filebench(args []string) (int, error) {
	if len(args) != 3 {
		return 64, errors.New("want a directory, MiB and a number of files")
	}
	dir := args[0]
	mib, err := strconv.Atoi(args[1])
	if err != nil {
		return 64, err
	}
	many, err := strconv.Atoi(args[2])
	if err != nil {
		return 64, err
	}
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
		{"write 1 MiB at a time", func() error { return writeBig(big, mib<<20, 1<<20) }, mib, "MiB/s"},
		{"read 1 MiB at a time", func() error { return readBig(big, 1<<20) }, mib, "MiB/s"},
		{"write 4 KiB at a time", func() error { return writeBig(big, mib<<16, 4<<10) }, mib << 16 / (4 << 10), "/s"},
		{"read 4 KiB at a time", func() error { return readBig(big, 4<<10) }, mib << 16 / (4 << 10), "/s"},
		{"create and write 1 KiB", each(func(p string) error { return os.WriteFile(p, make([]byte, 1<<10), 0o644) }), many, "/s"},
		{"stat", each(func(p string) error { _, err := os.Stat(p); return err }), many, "/s"},
		{"open and read 1 KiB", each(func(p string) error { _, err := os.ReadFile(p); return err }), many, "/s"},
		{"remove", each(os.Remove), many, "/s"},
	} {
		began := time.Now()
		if err := m.run(); err != nil {
			return 1, fmt.Errorf("%s: %w", m.name, err)
		}
		fmt.Printf("%-24s %10.1f %s\n", m.name, float64(m.n)/time.Since(began).Seconds(), m.unit)
	}
	return 0, os.Remove(big)
}

func writeBig(path string, size, piece int) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, piece)
	for ; size > 0; size -= piece {
		if _, err := f.Write(buf); err != nil {
			return err
		}
	}
	return f.Close()
}

func readBig(path string, piece int) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, make([]byte, piece))
	return err
}
