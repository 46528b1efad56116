// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package ninep

import (
	"bytes"
	"encoding/binary"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// seeds are what a client may say, message by message.
func seeds() [][]byte {
	var out [][]byte
	add := func(typ uint8, fields func(*encoder)) {
		var e encoder
		e.begin(typ, uint16(len(out)+1))
		fields(&e)
		out = append(out, bytes.Clone(e.finish()))
	}
	walk := func(from, to uint32, names ...string) {
		add(tWalk, func(e *encoder) {
			e.u32(from)
			e.u32(to)
			e.u16(uint16(len(names)))
			for _, n := range names {
				e.string(n)
			}
		})
	}
	add(tVersion, func(e *encoder) { e.u32(8192); e.string(version) })
	add(tAttach, func(e *encoder) { e.u32(0); e.u32(noFid); e.string(""); e.string(""); e.u32(0) })
	walk(0, 1, "v")
	walk(1, 2, "link")
	walk(1, 3, "d")
	walk(1, 4, "a")
	add(tReadlink, func(e *encoder) { e.u32(2) })
	add(tGetattr, func(e *encoder) { e.u32(1); e.u64(attrBasic) })
	add(tStatfs, func(e *encoder) { e.u32(1) })
	add(tMkdir, func(e *encoder) { e.u32(1); e.string("x"); e.u32(0o755); e.u32(0) })
	add(tSymlink, func(e *encoder) { e.u32(1); e.string("y"); e.string("../outside/secret"); e.u32(0) })
	add(tMknod, func(e *encoder) {
		e.u32(1)
		e.string("f")
		e.u32(unix.S_IFIFO)
		e.u32(0)
		e.u32(0)
		e.u32(0)
	})
	add(tLink, func(e *encoder) { e.u32(3); e.u32(4); e.string("h") })
	add(tRenameat, func(e *encoder) { e.u32(1); e.string("x"); e.u32(3); e.string("..") })
	add(tUnlinkat, func(e *encoder) { e.u32(1); e.string("y"); e.u32(0) })
	add(tSetattr, func(e *encoder) {
		for _, v := range []uint32{4, 0x1ff, 0o600, 0, 0} {
			e.u32(v)
		}
		for range 5 {
			e.u64(1)
		}
	})
	add(tLopen, func(e *encoder) { e.u32(4); e.u32(unix.O_RDWR) })
	add(tWrite, func(e *encoder) { e.u32(4); e.u64(0); e.u32(2); e.u16(0) })
	add(tRead, func(e *encoder) { e.u32(4); e.u64(0); e.u32(100) })
	add(tFsync, func(e *encoder) { e.u32(4); e.u32(0) })
	add(tLock, func(e *encoder) { e.u32(4) })
	add(tXattrwalk, func(e *encoder) { e.u32(4); e.u32(9); e.string("") })
	add(tXattrcreate, func(e *encoder) { e.u32(3); e.string("user.x"); e.u64(1); e.u32(0) })
	add(tLcreate, func(e *encoder) { e.u32(1); e.string("../z"); e.u32(unix.O_RDWR); e.u32(0o644); e.u32(0) })
	add(tReaddir, func(e *encoder) { e.u32(3); e.u64(0); e.u32(4096) })
	add(tFlush, func(e *encoder) { e.u16(3) })
	add(tRemove, func(e *encoder) { e.u32(3) })
	add(tClunk, func(e *encoder) { e.u32(4) })
	return out
}

// pipe is a connection whose client has said all there is to say.
type pipe struct {
	io.Reader
	io.Writer
}

func (pipe) Close() error { return nil }

// FuzzServe has a server read what a hostile guest may send, and looks at what is around
// the volume.
func FuzzServe(f *testing.F) {
	all := bytes.Join(seeds(), nil)
	f.Add(all)
	for i := range seeds() {
		f.Add(bytes.Join(append(seeds()[:3:3], seeds()[i]), nil))
	}
	unix.Umask(0)
	f.Fuzz(func(t *testing.T, in []byte) {
		dir, outside := volume(t)
		before := fingerprint(t, filepath.Dir(dir), dir)
		s := NewServer(Limits{Fids: 64, Requests: 4})
		require.NoError(t, s.Add("v", openPath(t, dir), Maker{}))
		var out bytes.Buffer
		_ = s.Serve(pipe{bytes.NewReader(in), &out})
		require.Zero(t, s.fids.Load(), "fids are left")
		require.Zero(t, s.xattrs.Load(), "bytes of attributes are left")
		s.Close()
		require.Zero(t, descriptors(t, dir), "descriptors are left")
		require.Equal(t, before, fingerprint(t, filepath.Dir(dir), dir), "something outside has changed")
		require.NotContains(t, out.String(), "secret content", outside)
		for answers := out.Bytes(); len(answers) > 0; {
			size := binary.LittleEndian.Uint32(answers)
			require.True(t, size >= headerBytes && int(size) <= len(answers) && size <= DefaultMessageBytes)
			answers = answers[size:]
		}
	})
}

// fingerprint describes what is below top, but not below without.
func fingerprint(t testing.TB, top, without string) string {
	t.Helper()
	var out strings.Builder
	require.NoError(t, filepath.WalkDir(top, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || path == without {
			return fs.SkipDir
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		data := []byte(nil)
		if st.Mode&unix.S_IFMT == unix.S_IFREG {
			if data, err = os.ReadFile(path); err != nil {
				return err
			}
		}
		out.WriteString(path)
		//nolint:unconvert // 32 bits on other processors
		for _, v := range []uint64{uint64(st.Mode), uint64(st.Uid), uint64(st.Gid), uint64(st.Nlink) * uint64(st.Mode&unix.S_IFREG>>15), uint64(st.Mtim.Nano()) * uint64(st.Mode&unix.S_IFREG>>15)} {
			out.WriteByte(' ')
			out.WriteString(string(binary.BigEndian.AppendUint64(nil, v)))
		}
		out.Write(data)
		return nil
	}))
	return out.String()
}
