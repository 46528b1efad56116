// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package rootfs

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/erofs/go-erofs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// program writes an ELF file with the given segments and some bytes behind its headers.
func program(t *testing.T, name string, payload []byte, segments ...elf.ProgType) string {
	t.Helper()
	header := elf.Header64{
		Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT),
		Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: uint16(len(segments)),
	}
	copy(header.Ident[:], elf.ELFMAG)
	header.Ident[elf.EI_CLASS] = byte(elf.ELFCLASS64)
	header.Ident[elf.EI_DATA] = byte(elf.ELFDATA2LSB)
	header.Ident[elf.EI_VERSION] = byte(elf.EV_CURRENT)
	var b bytes.Buffer
	require.NoError(t, binary.Write(&b, binary.LittleEndian, header))
	for _, s := range segments {
		require.NoError(t, binary.Write(&b, binary.LittleEndian, elf.Prog64{Type: uint32(s)}))
	}
	b.Write(payload)
	path := filepath.Join(t.TempDir(), name)
	require.NoError(t, os.WriteFile(path, b.Bytes(), 0o600))
	return path
}

func inputs(t *testing.T) Inputs {
	t.Helper()
	return Inputs{
		Agent:   program(t, "agent", bytes.Repeat([]byte("agent"), 3000), elf.PT_LOAD),
		Runtime: program(t, "crun", bytes.Repeat([]byte("crun"), 5000), elf.PT_LOAD),
	}
}

func create(t *testing.T, in Inputs) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "rootfs.erofs")
	_, _, err := Create(path, in)
	require.NoError(t, err)
	return path
}

func mount(t *testing.T, path string) fs.FS {
	t.Helper()
	f, err := os.Open(path)
	require.NoError(t, err)
	t.Cleanup(func() { f.Close() })
	image, err := erofs.Open(f)
	require.NoError(t, err)
	return image
}

func TestImageReadsBack(t *testing.T) {
	in := inputs(t)
	image := mount(t, create(t, in))

	modes := map[string]fs.FileMode{}
	require.NoError(t, fs.WalkDir(image, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		// The reader leaves the inode's raw type bits in the mode.
		modes[path] = info.Mode() & (fs.ModeType | fs.ModePerm)
		stat, ok := info.Sys().(*erofs.Stat)
		require.True(t, ok, "stat of %s is %T", path, info.Sys())
		assert.Zero(t, stat.UID, path)
		assert.Zero(t, stat.GID, path)
		assert.Equal(t, time.Unix(0, 0).UTC(), info.ModTime().UTC(), path)
		return nil
	}))
	assert.Equal(t, map[string]fs.FileMode{
		".":              fs.ModeDir | 0o755,
		"bin":            fs.ModeDir | 0o755,
		"bin/crun":       0o755,
		"dev":            fs.ModeDir | 0o755,
		"etc":            fs.ModeDir | 0o755,
		"etc/group":      0o644,
		"etc/machine-id": 0o644,
		"etc/passwd":     0o644,
		"init":           0o755,
		"mnt":            fs.ModeDir | 0o755,
		"proc":           fs.ModeDir | 0o555,
		"run":            fs.ModeDir | 0o755,
		"sbin":           fs.ModeDir | 0o755,
		"sbin/init":      fs.ModeSymlink | 0o777,
		"sys":            fs.ModeDir | 0o555,
		"tmp":            fs.ModeDir | 0o755,
	}, modes)

	for guest, host := range map[string]string{"init": in.Agent, "bin/crun": in.Runtime, "sbin/init": in.Agent} {
		want, err := os.ReadFile(host)
		require.NoError(t, err)
		got, err := fs.ReadFile(image, guest)
		require.NoError(t, err)
		assert.Equal(t, want, got, guest)
	}
}

func TestImageIsReproducible(t *testing.T) {
	in := inputs(t)
	first, err := os.ReadFile(create(t, in))
	require.NoError(t, err)

	later := time.Now().Add(time.Hour)
	require.NoError(t, os.Chtimes(in.Agent, later, later))
	require.NoError(t, os.Chmod(in.Runtime, 0o700))
	second, err := os.ReadFile(create(t, in))
	require.NoError(t, err)
	assert.Equal(t, first, second)
}

func TestCreateReportsWhatIsInTheImage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "rootfs.erofs")
	entries, size, err := Create(path, inputs(t))
	require.NoError(t, err)

	info, err := os.Stat(path)
	require.NoError(t, err)
	assert.Equal(t, info.Size(), size)
	assert.Equal(t, fs.FileMode(0o644), info.Mode())
	sizes := map[string]int64{}
	for _, e := range entries {
		sizes[e.Path] = e.Size
	}
	assert.Equal(t, map[string]int64{
		"/etc/group": 27, "/etc/machine-id": 0, "/etc/passwd": 70, "/init": 15120, "/bin/crun": 20120,
	}, sizes)
}

func TestCreateRefuses(t *testing.T) {
	dynamic := program(t, "dynamic", nil, elf.PT_LOAD, elf.PT_INTERP)
	text := filepath.Join(t.TempDir(), "text")
	require.NoError(t, os.WriteFile(text, []byte("#!/bin/sh\n"), 0o600))
	large := program(t, "large", make([]byte, MaxSize), elf.PT_LOAD)

	for name, tc := range map[string]struct {
		agent   string
		message string
		is      error
	}{
		"absent":  {agent: "/nonexistent/agent", message: "/nonexistent/agent", is: fs.ErrNotExist},
		"dynamic": {agent: dynamic, message: "not a static executable"},
		"script":  {agent: text, message: "not an ELF executable"},
		"large":   {agent: large, message: "too large", is: ErrTooLarge},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "rootfs.erofs")
			require.NoError(t, os.WriteFile(path, []byte("before"), 0o600))
			in := inputs(t)
			in.Agent = tc.agent

			_, _, err := Create(path, in)
			require.ErrorContains(t, err, tc.message)
			if tc.is != nil {
				require.ErrorIs(t, err, tc.is)
			}
			left, err := os.ReadDir(dir)
			require.NoError(t, err)
			require.Len(t, left, 1)
			content, err := os.ReadFile(path)
			require.NoError(t, err)
			assert.Equal(t, "before", string(content))
		})
	}
}
