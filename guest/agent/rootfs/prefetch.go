// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package rootfs

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"io"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// maxPrefetch bounds what is read ahead of one file, in bytes.
	maxPrefetch = 8 << 20
	// maxInterpreter is the longest path of an interpreter that is looked at.
	maxInterpreter = 256
	// maxHops bounds the interpreters of interpreters.
	maxHops = 3
)

// Prefetch has the kernel begin to read the program that a process is about to run,
// and its interpreters: the host's disk is then read while the process is being made,
// and not page by page when it runs. All of it is the image's, and nothing of it is
// trusted: paths are resolved within root, and what cannot be found is left alone.
func Prefetch(root, cwd string, args, env []string) {
	if len(args) == 0 || args[0] == "" {
		return
	}
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(dir) //nolint:errcheck // it is only a place
	for _, program := range candidates(args[0], cwd, env) {
		if prefetch(dir, program, maxHops) {
			return
		}
	}
}

// candidates are the paths at which a program may be, in order.
func candidates(program, cwd string, env []string) []string {
	if strings.Contains(program, "/") {
		if !path.IsAbs(program) {
			program = path.Join("/", cwd, program)
		}
		return []string{program}
	}
	var paths []string
	for _, e := range env {
		if list, ok := strings.CutPrefix(e, "PATH="); ok {
			paths = paths[:0]
			for d := range strings.SplitSeq(list, ":") {
				paths = append(paths, path.Join("/", d, program))
			}
		}
	}
	return paths
}

// prefetch returns whether there is such a file.
func prefetch(root int, name string, hops int) bool {
	fd, err := unix.Openat2(root, strings.TrimPrefix(name, "/"), &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return false
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return false
	}
	_ = unix.Fadvise(fd, 0, maxPrefetch, unix.FADV_WILLNEED)
	if next := interpreter(f); next != "" && hops > 0 {
		prefetch(root, next, hops-1)
	}
	return true
}

// interpreter returns the program that the kernel runs for this one, "" if it runs it
// itself: that of a script's first line, or an ELF file's.
func interpreter(f io.ReaderAt) string {
	head := make([]byte, maxInterpreter)
	n, _ := f.ReadAt(head, 0)
	head = head[:n]
	if line, ok := bytes.CutPrefix(head, []byte("#!")); ok {
		line, _, _ = bytes.Cut(line, []byte("\n"))
		if fields := bytes.Fields(line); len(fields) > 0 {
			return string(fields[0])
		}
		return ""
	}
	return elfInterpreter(f, head)
}

// elfInterpreter reads no more than a 64-bit file's program headers.
func elfInterpreter(f io.ReaderAt, head []byte) string {
	var h elf.Header64
	if len(head) < binary.Size(h) || !bytes.HasPrefix(head, []byte(elf.ELFMAG)) ||
		elf.Class(head[elf.EI_CLASS]) != elf.ELFCLASS64 || elf.Data(head[elf.EI_DATA]) != elf.ELFDATA2LSB {
		return ""
	}
	if binary.Read(bytes.NewReader(head), binary.LittleEndian, &h) != nil || h.Phoff > maxPrefetch {
		return ""
	}
	var p elf.Prog64
	for i := range min(int64(h.Phnum), 64) {
		at := io.NewSectionReader(f, int64(h.Phoff)+i*int64(binary.Size(p)), int64(binary.Size(p))) //nolint:gosec // bounded above
		if binary.Read(at, binary.LittleEndian, &p) != nil {
			return ""
		}
		if elf.ProgType(p.Type) != elf.PT_INTERP || p.Filesz == 0 || p.Filesz > maxInterpreter || p.Off > maxPrefetch {
			continue
		}
		name := make([]byte, p.Filesz)
		if _, err := f.ReadAt(name, int64(p.Off)); err != nil {
			return ""
		}
		return string(bytes.TrimRight(name, "\x00"))
	}
	return ""
}
