// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package testimage makes container images in process, from what the host has:
// no registry is needed.
package testimage

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage/pattern"
)

// References that the images are used under.
const (
	BusyboxRef = "localhost/chv/busybox:latest"
	HelperRef  = "localhost/chv/helper:latest"
	NastyRef   = "localhost/chv/nasty:latest"
	ClonesRef  = "localhost/chv/clones:latest"
	// VolumeRef is Volume.
	VolumeRef = "localhost/chv/volume:latest"
	// BigRef is Big.
	BigRef = "localhost/chv/big:latest"
)

// HelperPath is where the helper is in the images that have it, CWhoPath where the
// C program is in that of Clones.
const (
	HelperPath = "/bin/helper"
	CWhoPath   = "/bin/cwho"
)

// epoch is the time of all files that have no special one.
var epoch = time.Unix(1_700_000_000, 0)

// FindBusybox returns the path of a static busybox: $BUSYBOX, or the first in
// PATH and /bin that is static.
func FindBusybox() (string, error) {
	tried := []string{os.Getenv("BUSYBOX")}
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/bin") {
		tried = append(tried, filepath.Join(dir, "busybox"))
	}
	for _, p := range tried {
		if p != "" && isStatic(p) {
			return p, nil
		}
	}
	return "", fmt.Errorf("no static busybox in PATH (package busybox-static): %w", errdefs.ErrNotFound)
}

// isStatic tells whether path is a program that needs no loader.
func isStatic(path string) bool {
	f, err := elf.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return false
		}
	}
	return true
}

// Busybox is an image of one layer: busybox with a hard link for each applet, a
// few users and groups, and /tmp.
func Busybox() (v1.Image, error) {
	layer, err := busyboxLayer()
	if err != nil {
		return nil, err
	}
	return build([]*archive{layer}, v1.Config{
		Cmd: []string{"/bin/sh"},
		Env: []string{"PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "FROM_IMAGE=yes"},
	})
}

// Pause is the image of an idle process, for the sandboxes of other runtimes: it opens
// a FIFO that nobody writes to. It is no sleep, as others look for theirs by name where
// they share its PID namespace.
func Pause() (v1.Image, error) {
	path, err := FindBusybox()
	if err != nil {
		return nil, err
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	a := newArchive()
	a.dir("bin", 0o755)
	a.file("bin/cat", 0o755, data)
	a.node("never", tar.TypeFifo, 0, 0, 0o600)
	return build([]*archive{a}, v1.Config{Entrypoint: []string{"/bin/cat", "/never"}})
}

// Helper is Busybox and the tests' helper, with a working directory, a user
// and an environment of its own.
func Helper(helper []byte) (v1.Image, error) {
	return withHelper(helper, nil)
}

// Clones is Helper and the C program of BuildCWho.
func Clones(helper, cwho []byte) (v1.Image, error) {
	return withHelper(helper, map[string][]byte{CWhoPath: cwho})
}

// BigPath is where the large file is in the image Big, BigBytes its size.
const (
	BigPath  = "/big"
	BigBytes = 32 << 20
)

// Big is Helper with a large file.
func Big(helper []byte) (v1.Image, error) {
	data, err := io.ReadAll(pattern.New(1, BigBytes))
	if err != nil {
		return nil, err
	}
	return withHelper(helper, map[string][]byte{BigPath: data})
}

// Volume is Helper with a volume at /data, in which the image has a file.
func Volume(helper []byte) (v1.Image, error) {
	img, err := withHelper(helper, map[string][]byte{"/data/prepared": []byte("by the image\n")})
	if err != nil {
		return nil, err
	}
	file, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	file.Config.Volumes = map[string]struct{}{"/data": {}}
	return mutate.ConfigFile(img, file)
}

func withHelper(helper []byte, programs map[string][]byte) (v1.Image, error) {
	base, err := busyboxLayer()
	if err != nil {
		return nil, err
	}
	a := newArchive()
	a.file("bin/helper", 0o755, helper)
	for path, data := range programs {
		a.file(strings.TrimPrefix(path, "/"), 0o755, data)
	}
	a.dir("work", 0o777)
	return build([]*archive{base, a}, v1.Config{
		Cmd:        []string{HelperPath},
		Env:        []string{"PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "FROM_IMAGE=yes"},
		WorkingDir: "/work",
		Labels:     map[string]string{"test": "helper"},
	})
}

// prebuilt is the program of that name in $E2E_PROGRAMS, for machines on which a
// compiler is missing or too slow. It is nil if that is not set.
func prebuilt(name string) ([]byte, error) {
	dir := os.Getenv("E2E_PROGRAMS")
	if dir == "" {
		return nil, nil
	}
	return os.ReadFile(filepath.Join(dir, name))
}

// BuildHelper compiles the helper with the host's go and returns its bytes. The
// program is put into dir, and taken away again. In $E2E_PROGRAMS it may lie ready.
func BuildHelper(repo, dir string) ([]byte, error) {
	return buildGo("helper", repo, dir)
}

// buildGo compiles the program of that name, which is a package below this one.
func buildGo(name, repo, dir string) ([]byte, error) {
	if b, err := prebuilt(name); b != nil || err != nil {
		return b, err
	}
	out := filepath.Join(dir, name)
	defer os.Remove(out)
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, "./e2e/testimage/"+name)
	cmd.Dir = repo
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false")
	if os.Getenv("SUDO_USER") != "" {
		// Root's files would spoil the user's build cache.
		cmd.Env = append(cmd.Env, "GOCACHE="+filepath.Join(repo, "build", "cache", "go-root"))
	}
	if b, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("building %s: %w\n%s", name, err, b)
	}
	return os.ReadFile(out)
}

// BuildCWho compiles the C program that prints random bytes with the host's compiler,
// static, and returns its bytes. The program is put into dir. In $E2E_PROGRAMS it may
// lie ready.
func BuildCWho(repo, dir string) ([]byte, error) {
	if b, err := prebuilt("cwho"); b != nil || err != nil {
		return b, err
	}
	out := filepath.Join(dir, "cwho")
	cmd := exec.Command("gcc", "-static", "-O2", "-Wall", "-Werror", "-o", out, "e2e/testimage/cwho/cwho.c")
	cmd.Dir = repo
	cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":"+filepath.Join(repo, "build", "host", "bin"))
	if b, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("compiling cwho.c: %w\n%s", err, b)
	}
	return os.ReadFile(out)
}

// build makes an image of uncompressed layers.
func build(layers []*archive, cfg v1.Config) (v1.Image, error) {
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	for _, a := range layers {
		b, err := a.bytes()
		if err != nil {
			return nil, err
		}
		if img, err = mutate.AppendLayers(img, static.NewLayer(b, types.OCIUncompressedLayer)); err != nil {
			return nil, fmt.Errorf("adding a layer: %w", err)
		}
	}
	file, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.Config, file.OS, file.Architecture = cfg, "linux", arch()
	file.Created = v1.Time{Time: epoch}
	return mutate.ConfigFile(img, file)
}

func busyboxLayer() (*archive, error) {
	path, err := FindBusybox()
	if err != nil {
		return nil, err
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	applets, err := exec.Command(path, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("listing the applets of %s: %w", path, err)
	}
	a := newArchive()
	for _, d := range []string{"bin", "etc", "root", "home", "home/app", "usr", "usr/bin", "var", "var/log", "sbin"} {
		a.dir(d, 0o755)
	}
	a.dir("tmp", 0o1777)
	a.file("bin/busybox", 0o755, data)
	for name := range bytes.FieldsSeq(applets) {
		if string(name) != "busybox" {
			a.hardLink("bin/"+string(name), "bin/busybox")
		}
	}
	a.file("etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/home/app:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"))
	a.file("etc/group", 0o644, []byte("root:x:0:\napp:x:1000:\nextra:x:2000:app\nmore:x:2001:app\nnogroup:x:65534:\n"))
	a.file("etc/image-file", 0o644, []byte("from the image\n"))
	return a, nil
}
