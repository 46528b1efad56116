// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package testimage

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// packages is a directory with the files of unpacked Debian packages, from which
// programs are taken into images with what they need to run.
type packages struct {
	root string
	// have are the images' paths of libraries that were added.
	have map[string]bool
}

func newPackages(root string) *packages {
	return &packages{root: root, have: map[string]bool{}}
}

// onTop is the same packages for one more layer: what was added until now is below it.
func (p *packages) onTop() *packages {
	return &packages{root: p.root, have: maps.Clone(p.have)}
}

// find returns the host's path of a file that a package may have in either place:
// before or after /bin, /sbin and /lib became links into /usr.
func (p *packages) find(name string) (string, error) {
	for _, dir := range []string{"", "usr"} {
		file := filepath.Join(p.root, dir, name)
		if _, err := os.Stat(file); err == nil {
			return file, nil
		}
	}
	return "", fmt.Errorf("no package in %s has the file %s (hack/setup/packages.sh files critest): %w", p.root, name, errdefs.ErrNotFound)
}

// library returns the host's path of a library, the program's interpreter included.
func (p *packages) library(name string) (string, error) {
	for _, pattern := range []string{"lib/*-linux-gnu*", "usr/lib/*-linux-gnu*"} {
		files, err := filepath.Glob(filepath.Join(p.root, pattern, name))
		if err != nil {
			return "", err
		}
		if len(files) > 0 {
			return files[0], nil
		}
	}
	return "", fmt.Errorf("no package in %s has the library %s: %w", p.root, name, errdefs.ErrNotFound)
}

// addProgram puts the packages' file from into the archive as name, with the
// libraries that it needs, which lie in /lib there.
func (p *packages) addProgram(a *archive, name, from string) error {
	file, err := p.find(from)
	if err != nil {
		return err
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	a.file(name, 0o755, data)
	return p.addNeeded(a, file)
}

// addNeeded adds what the ELF file needs that is not there yet.
func (p *packages) addNeeded(a *archive, file string) error {
	interpreter, needed, err := dependencies(file)
	if err != nil {
		return fmt.Errorf("reading %s: %w", file, err)
	}
	dest := map[string]string{}
	if interpreter != "" {
		dest[path.Base(interpreter)] = strings.TrimPrefix(interpreter, "/")
	}
	for _, lib := range append(needed, path.Base(interpreter)) {
		// A library may need the interpreter as well, which has its place already.
		if interpreter == "" && (lib == "." || strings.HasPrefix(lib, "ld-linux")) {
			continue
		}
		name := dest[lib]
		if name == "" {
			name = "lib/" + lib
		}
		if p.have[name] {
			continue
		}
		p.have[name] = true
		from, err := p.library(lib)
		if err != nil {
			return err
		}
		data, err := os.ReadFile(from)
		if err != nil {
			return err
		}
		a.file(name, 0o755, data)
		if err := p.addNeeded(a, from); err != nil {
			return err
		}
	}
	return nil
}

// dependencies are an ELF file's interpreter, if it has one, and its libraries' names.
func dependencies(file string) (interpreter string, needed []string, err error) {
	f, err := elf.Open(file)
	if err != nil {
		return "", nil, err
	}
	defer f.Close()
	for _, prog := range f.Progs {
		if prog.Type == elf.PT_INTERP {
			b, err := io.ReadAll(prog.Open())
			if err != nil {
				return "", nil, err
			}
			interpreter = strings.TrimRight(string(b), "\x00")
		}
	}
	needed, err = f.ImportedLibraries()
	// Libraries name the interpreter too.
	needed = slices.DeleteFunc(needed, func(s string) bool { return s == path.Base(interpreter) })
	return interpreter, needed, err
}

// command is a command line that runs a program of the packages on the host, with
// the packages' own libraries.
func (p *packages) command(program string, args ...string) ([]string, error) {
	file, err := p.find(program)
	if err != nil {
		return nil, err
	}
	interpreter, _, err := dependencies(file)
	if err != nil {
		return nil, err
	}
	loader, err := p.library(path.Base(interpreter))
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, pattern := range []string{"lib/*-linux-gnu*", "usr/lib/*-linux-gnu*"} {
		found, err := filepath.Glob(filepath.Join(p.root, pattern))
		if err != nil {
			return nil, err
		}
		dirs = append(dirs, found...)
	}
	return append([]string{loader, "--library-path", strings.Join(dirs, ":"), file}, args...), nil
}

// present tells whether packages were unpacked into the directory at all.
func (p *packages) present() error {
	if _, err := os.Stat(p.root); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s is missing (hack/setup/packages.sh files critest %s): %w", p.root, p.root, errdefs.ErrNotFound)
	} else if err != nil {
		return err
	}
	return nil
}
