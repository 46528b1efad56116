// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package rootfs makes the read-only root file system of the guest: an erofs image that holds the
// agent, the OCI runtime and the directories that the agent mounts on.
package rootfs

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/erofs/go-erofs"
)

// MaxSize is the size in bytes that an image may have. Every pod's VM reads from it, so what is put
// in is paid for in page cache and in the time to the first answer.
const MaxSize = 12 << 20

const (
	agentPath   = "/init"
	runtimePath = "/bin/crun"
	dirMode     = fs.FileMode(0o755)
)

// ErrTooLarge is returned when an image exceeds MaxSize.
var ErrTooLarge = errors.New("guest image too large")

// Inputs names the programs that go into the image. Both are static ELF executables: the image has no
// dynamic linker.
type Inputs struct {
	// Agent is the host path of the guest agent, which becomes /init.
	Agent string
	// Runtime is the host path of crun, which becomes /bin/crun.
	Runtime string
}

// Entry is a regular file of the image.
type Entry struct {
	// Path is absolute, as seen in the guest.
	Path string
	// Size is in bytes.
	Size int64
}

// The image is mounted read-only, so each directory that something is mounted on must be in it.
var directories = []struct {
	path string
	mode fs.FileMode
}{
	{"/bin", dirMode},
	{"/dev", dirMode},
	{"/etc", dirMode},
	{"/mnt", dirMode},
	{"/proc", 0o555},
	{"/run", dirMode},
	{"/sbin", dirMode},
	{"/sys", 0o555},
	{"/tmp", dirMode},
}

// Programs of the image look up names of users. A container's own come from its own image. The
// machine ID is the agent's to mount.
var texts = []struct{ path, content string }{
	{"/etc/group", "root:x:0:\nnogroup:x:65534:\n"},
	{"/etc/machine-id", ""},
	{"/etc/passwd", "root:x:0:0:root:/:/bin/false\nnobody:x:65534:65534:nobody:/:/bin/false\n"},
}

// Build writes an image to out, which must be empty, and returns the regular files in it. The same
// inputs give the same bytes: owners are root and times are zero. When Build fails, what is in out is
// of no use. It does not look at MaxSize; see [Create].
func Build(out io.WriteSeeker, in Inputs) ([]Entry, error) {
	image := &builder{w: erofs.Create(out, erofs.WithBuildTime(0, 0))}
	image.directory("/", dirMode)
	for _, d := range directories {
		image.directory(d.path, d.mode)
	}
	for _, t := range texts {
		image.text(t.path, t.content)
	}
	image.program(agentPath, in.Agent)
	image.program(runtimePath, in.Runtime)
	image.symlink("/sbin/init", agentPath)
	if image.err != nil {
		return nil, image.err
	}
	if err := image.w.Close(); err != nil {
		return nil, fmt.Errorf("write guest image: %w", err)
	}
	return image.entries, nil
}

// builder adds entries to an image until the first error, which it keeps.
type builder struct {
	w       *erofs.Writer
	entries []Entry
	err     error
}

// finish gives the entry its owner and time, or keeps err.
func (b *builder) finish(path string, err error) {
	if err == nil {
		err = errors.Join(
			b.w.Chown(path, 0, 0),
			b.w.Chtimes(path, time.Unix(0, 0), time.Unix(0, 0)),
		)
	}
	if err != nil {
		b.err = fmt.Errorf("add %s to guest image: %w", path, err)
	}
}

func (b *builder) directory(path string, mode fs.FileMode) {
	if b.err == nil {
		b.finish(path, b.w.Mkdir(path, mode))
	}
}

func (b *builder) symlink(path, target string) {
	if b.err == nil {
		b.finish(path, b.w.Symlink(target, path))
	}
}

func (b *builder) text(path, content string) {
	if b.err == nil {
		b.finish(path, b.file(path, 0o644, func(w io.Writer) (int64, error) {
			n, err := io.WriteString(w, content)
			return int64(n), err
		}))
	}
}

func (b *builder) program(path, source string) {
	if b.err != nil {
		return
	}
	f, err := openProgram(source)
	if err != nil {
		b.err = err
		return
	}
	defer f.Close()
	b.finish(path, b.file(path, 0o755, func(w io.Writer) (int64, error) { return io.Copy(w, f) }))
}

func (b *builder) file(path string, mode fs.FileMode, fill func(io.Writer) (int64, error)) error {
	f, err := b.w.Create(path)
	if err != nil {
		return err
	}
	size, err := fill(f)
	if err != nil {
		return errors.Join(err, f.Close())
	}
	if err := errors.Join(f.Chmod(mode), f.Close()); err != nil {
		return err
	}
	b.entries = append(b.entries, Entry{Path: path, Size: size})
	return nil
}

// openProgram opens an executable and refuses what could not run in the guest.
func openProgram(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("program for guest image: %w", err)
	}
	if err := checkStatic(f); err != nil {
		return nil, errors.Join(fmt.Errorf("program for guest image: %s: %w", path, err), f.Close())
	}
	return f, nil
}

func checkStatic(r io.ReaderAt) error {
	program, err := elf.NewFile(r)
	if err != nil {
		return fmt.Errorf("not an ELF executable: %w", err)
	}
	for _, segment := range program.Progs {
		if segment.Type == elf.PT_INTERP {
			return errors.New("not a static executable")
		}
	}
	return nil
}
