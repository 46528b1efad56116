// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package ninep

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// client speaks the protocol to a server, one request at a time.
type client struct {
	t    testing.TB
	conn net.Conn
	tag  uint16
}

// connect serves dir as the volume "v", and more as they are named, to a client that has
// agreed on a version, and attached fid 0 for user 0.
func connect(t testing.TB, limits Limits, dir string) (*client, *Server) {
	t.Helper()
	s := NewServer(limits)
	t.Cleanup(s.Close)
	require.NoError(t, s.Add("v", openPath(t, dir), Maker{}))
	return dial(t, s), s
}

func dial(t testing.TB, s *Server) *client {
	t.Helper()
	here, there := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- s.Serve(there) }()
	t.Cleanup(func() {
		_ = here.Close()
		<-done
	})
	c := &client{t: t, conn: here}
	d := c.must(tVersion, func(e *encoder) { e.u32(DefaultMessageBytes); e.string(version) })
	require.NotZero(t, d.u32())
	require.Equal(t, version, d.string())
	c.attach(0, 0)
	return c
}

func openPath(t testing.TB, path string) int {
	t.Helper()
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	require.NoError(t, err)
	return fd
}

// call sends a message and returns the answer's fields, or the error that it is.
func (c *client) call(typ uint8, fields func(*encoder)) (*decoder, error) {
	c.tag++
	var e encoder
	e.begin(typ, c.tag)
	if fields != nil {
		fields(&e)
	}
	if _, err := c.conn.Write(e.finish()); err != nil {
		return nil, err
	}
	var h [headerBytes]byte
	if _, err := io.ReadFull(c.conn, h[:]); err != nil {
		return nil, err
	}
	d := &decoder{b: make([]byte, binary.LittleEndian.Uint32(h[:])-headerBytes)}
	if _, err := io.ReadFull(c.conn, d.b); err != nil {
		return nil, err
	}
	require.Equal(c.t, c.tag, binary.LittleEndian.Uint16(h[5:]))
	if h[4] == tLerror+1 {
		return nil, unix.Errno(d.u32())
	}
	require.Equal(c.t, typ+1, h[4])
	return d, nil
}

func (c *client) must(typ uint8, fields func(*encoder)) *decoder {
	c.t.Helper()
	d, err := c.call(typ, fields)
	require.NoError(c.t, err)
	return d
}

func (c *client) attach(fid, uid uint32) {
	c.t.Helper()
	c.must(tAttach, func(e *encoder) { e.u32(fid); e.u32(noFid); e.string("root"); e.string(""); e.u32(uid) })
}

func (c *client) walk(from, to uint32, names ...string) error {
	d, err := c.call(tWalk, func(e *encoder) {
		e.u32(from)
		e.u32(to)
		e.u16(uint16(len(names)))
		for _, n := range names {
			e.string(n)
		}
	})
	if err == nil && int(d.u16()) < len(names) {
		return unix.ENOENT
	}
	return err
}

func (c *client) open(fid, flags uint32) error {
	_, err := c.call(tLopen, func(e *encoder) { e.u32(fid); e.u32(flags) })
	return err
}

func (c *client) create(fid uint32, name string, flags, mode, gid uint32) error {
	_, err := c.call(tLcreate, func(e *encoder) { e.u32(fid); e.string(name); e.u32(flags); e.u32(mode); e.u32(gid) })
	return err
}

func (c *client) read(fid uint32, offset uint64, count uint32) (string, error) {
	d, err := c.call(tRead, func(e *encoder) { e.u32(fid); e.u64(offset); e.u32(count) })
	if err != nil {
		return "", err
	}
	return string(d.take(int(d.u32()))), nil
}

func (c *client) write(fid uint32, offset uint64, data string) error {
	_, err := c.call(tWrite, func(e *encoder) { e.u32(fid); e.u64(offset); e.u32(uint32(len(data))); e.b = append(e.b, data...) })
	return err
}

func (c *client) clunk(fid uint32) error {
	_, err := c.call(tClunk, func(e *encoder) { e.u32(fid) })
	return err
}

func (c *client) setattr(fid, valid, mode, uid, gid uint32, size uint64) error {
	_, err := c.call(tSetattr, func(e *encoder) {
		for _, v := range []uint32{fid, valid, mode, uid, gid} {
			e.u32(v)
		}
		e.u64(size)
		for range 4 {
			e.u64(0)
		}
	})
	return err
}

func (c *client) list(fid uint32, count uint32) []string {
	c.t.Helper()
	var names []string
	for offset := uint64(0); ; {
		d := c.must(tReaddir, func(e *encoder) { e.u32(fid); e.u64(offset); e.u32(count) })
		if d.u32() == 0 {
			return names
		}
		for len(d.b) > 0 {
			d.take(13)
			offset = d.u64()
			d.u8()
			names = append(names, d.string())
			require.False(c.t, d.bad)
		}
	}
}

// descriptors counts this process's open files below dir.
func descriptors(t testing.TB, dir string) int {
	t.Helper()
	links, err := filepath.Glob("/proc/self/fd/*")
	require.NoError(t, err)
	n := 0
	for _, l := range links {
		to, err := os.Readlink(l)
		if err == nil && (to == dir || len(to) > len(dir) && to[:len(dir)+1] == dir+"/") {
			n++
		}
	}
	return n
}

func requireErrno(t testing.TB, want unix.Errno, err error, text string) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("%s: %v: want %v", text, err, want)
	}
}
