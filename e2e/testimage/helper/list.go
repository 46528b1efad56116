// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage/pattern"
)

// inode identifies a file, whatever it is called.
type inode struct{ dev, ino uint64 }

// list prints a line for each file below a root, in order of their names:
// path, type and mode, owner, size, device number, link target, the first path
// that is the same file, extended attributes, digest of the content, mtime.
// Sizes of directories are left out: they are the file system's own affair.
func list(args []string) (int, error) {
	if len(args) == 0 {
		return 0, errors.New("no root")
	}
	out := bufio.NewWriterSize(os.Stdout, 1<<16)
	l := &lister{first: map[inode]string{}, buf: make([]byte, 1<<17)}
	err := filepath.WalkDir(args[0], func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if slices.Contains(args[1:], path) {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		line, err := l.describe(path)
		if err != nil {
			return fmt.Errorf("%q: %w", path, err)
		}
		_, err = out.WriteString(line)
		return err
	})
	return 0, errors.Join(err, out.Flush())
}

// lister describes files. Its buffer is used for all of them: in software
// emulation a new one for each of many files takes longer than the files.
type lister struct {
	// first is the first path of each file.
	first map[inode]string
	buf   []byte
}

func (l *lister) describe(path string) (string, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return "", err
	}
	size, same, link, digest := st.Size, "-", "-", "-"
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		size = 0
	case unix.S_IFLNK:
		if link, err = os.Readlink(path); err != nil {
			return "", err
		}
	case unix.S_IFREG:
		if digest, err = l.digestOf(path); err != nil {
			return "", err
		}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		id := inode{st.Dev, st.Ino}
		if p, ok := l.first[id]; ok {
			same = p
		} else {
			l.first[id] = path
		}
	}
	attrs, err := l.xattrs(path)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%q %o %d:%d %d %x %q %q %s %s %d.%09d\n", path, st.Mode, st.Uid, st.Gid, size, st.Rdev, link, same, attrs, digest,
		st.Mtim.Sec, st.Mtim.Nsec), nil
}

func (l *lister) digestOf(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var c pattern.Checksum
	for {
		n, err := f.Read(l.buf)
		// It cannot fail.
		_, _ = c.Write(l.buf[:n])
		if errors.Is(err, io.EOF) {
			return c.String(), nil
		}
		if err != nil {
			return "", err
		}
	}
}

// xattrs returns name=hex pairs, in order and separated by commas, or "-".
func (l *lister) xattrs(path string) (string, error) {
	list, val := l.buf[:len(l.buf)/2], l.buf[len(l.buf)/2:]
	n, err := unix.Llistxattr(path, list)
	if errors.Is(err, unix.ENOTSUP) || n == 0 {
		return "-", nil
	}
	if err != nil {
		return "", err
	}
	var pairs []string
	for name := range bytes.SplitSeq(bytes.TrimSuffix(list[:n], []byte{0}), []byte{0}) {
		n, err := unix.Lgetxattr(path, string(name), val)
		if err != nil {
			return "", fmt.Errorf("%s: %w", name, err)
		}
		pairs = append(pairs, fmt.Sprintf("%s=%x", name, val[:n]))
	}
	slices.Sort(pairs)
	return strings.Join(pairs, ","), nil
}

// names prints how many names a directory has, without a look at what they are.
func names(args []string) (int, error) {
	if len(args) != 1 {
		return 64, errors.New("want a directory")
	}
	f, err := os.Open(args[0])
	if err != nil {
		return 1, err
	}
	defer f.Close()
	all, err := f.Readdirnames(-1)
	fmt.Println(len(all))
	return 0, err
}
