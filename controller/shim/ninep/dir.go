// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package ninep

import (
	"bytes"
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// mkdir makes a directory.
func (c *session) mkdir(r *request, e *encoder) error {
	id, name, mode, gid := r.u32(), r.string(), r.u32(), r.u32()
	return c.makeName(r, e, id, name, mode, gid, func(dir int) error {
		return unix.Mkdirat(dir, name, mode&permissions)
	})
}

// symlink makes a symbolic link. Its target is the guest's to make sense of.
func (c *session) symlink(r *request, e *encoder) error {
	id, name, target, gid := r.u32(), r.string(), r.string(), r.u32()
	return c.makeName(r, e, id, name, 0, gid, func(dir int) error {
		return unix.Symlinkat(target, dir, name)
	})
}

// mknod makes a FIFO, a socket or an empty file. Device nodes would be the host's.
func (c *session) mknod(r *request, e *encoder) error {
	id, name, mode, _, _, gid := r.u32(), r.string(), r.u32(), r.u32(), r.u32(), r.u32()
	return c.makeName(r, e, id, name, mode, gid, func(dir int) error {
		switch mode & unix.S_IFMT {
		case unix.S_IFIFO, unix.S_IFSOCK, unix.S_IFREG:
			return unix.Mknodat(dir, name, mode&(unix.S_IFMT|permissions), 0)
		}
		return unix.EPERM
	})
}

// makeName makes a name in the directory id by create, gives it to its user, and answers
// with its qid.
func (c *session) makeName(r *request, e *encoder, id uint32, name string, mode, gid uint32, create func(dir int) error) error {
	dir, done, err := c.useDir(r, id, name)
	if err != nil {
		return err
	}
	defer done()
	if err := dir.node.export.maker.do(func() error { return create(dir.node.fd) }); err != nil {
		return err
	}
	n, st, err := lookUp(dir.node, name)
	if err != nil {
		return err
	}
	defer n.put()
	path := n.procPath()
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		path = ""
	}
	if err := own(n.fd, path, mode, dir.uid, gid); err != nil {
		flags := 0
		if n.isDir() {
			flags = unix.AT_REMOVEDIR
		}
		_ = unix.Unlinkat(dir.node.fd, name, flags)
		return err
	}
	e.qid(c.s.qidOf(st))
	return nil
}

// link gives a file another name.
func (c *session) link(r *request, _ *encoder) error {
	dirID, id, name := r.u32(), r.u32(), r.string()
	dir, done, err := c.useDir(r, dirID, name)
	if err != nil {
		return err
	}
	defer done()
	f, done, err := c.useNode(r, id)
	if err != nil {
		return err
	}
	defer done()
	if f.node.export != dir.node.export {
		return unix.EXDEV
	}
	return dir.node.export.maker.do(func() error {
		return unix.Linkat(unix.AT_FDCWD, f.node.procPath(), dir.node.fd, name, unix.AT_SYMLINK_FOLLOW)
	})
}

// renameat moves a name within its volume.
func (c *session) renameat(r *request, _ *encoder) error {
	fromID, from, toID, to := r.u32(), r.string(), r.u32(), r.string()
	old, done, err := c.useDir(r, fromID, from)
	if err != nil {
		return err
	}
	defer done()
	dir, done, err := c.useDir(r, toID, to)
	if err != nil {
		return err
	}
	defer done()
	if old.node.export != dir.node.export {
		return unix.EXDEV
	}
	return dir.node.export.maker.do(func() error {
		return unix.Renameat(old.node.fd, from, dir.node.fd, to)
	})
}

// unlinkat removes a name.
func (c *session) unlinkat(r *request, _ *encoder) error {
	id, name, flags := r.u32(), r.string(), r.u32()
	if flags&^unix.AT_REMOVEDIR != 0 {
		return unix.EINVAL
	}
	dir, done, err := c.useDir(r, id, name)
	if err != nil {
		return err
	}
	defer done()
	return unix.Unlinkat(dir.node.fd, name, int(flags))
}

const (
	// direntFixed are the bytes of a host's entry before its name, and of ours.
	direntFixed = 8 + 8 + 2 + 1
	entryFixed  = 13 + 8 + 1 + 2
)

// readdir lists a directory from a position on, in pieces that fit a message.
func (c *session) readdir(r *request, e *encoder) error {
	id, offset, count := r.u32(), r.offset(), r.u32()
	f, done, err := c.use(r, id)
	if err != nil {
		return err
	}
	defer done()
	at := len(e.b)
	e.u32(0)
	if f.node == nil {
		// The guest's agent knows the volumes' names.
		return nil
	}
	most := int(min(count, c.msize-headerBytes-4))
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.file < 0 || !f.node.isDir() {
		return unix.EBADF
	}
	if err := c.list(f, offset, most, e); err != nil {
		return err
	}
	binary.LittleEndian.PutUint32(e.b[at:], uint32(len(e.b)-at-4))
	return nil
}

// list appends entries of at most so many bytes. f.mu is held.
func (c *session) list(f *fid, offset int64, most int, e *encoder) error {
	if offset != f.cookie {
		if _, err := unix.Seek(f.file, offset, unix.SEEK_SET); err != nil {
			return err
		}
		f.cookie = offset
	}
	st, err := statFD(f.file)
	if err != nil {
		return err
	}
	buf := getBuffer(min(most, DefaultMessageBytes))
	defer putBuffer(buf)
	n, err := retried(func() (int, error) { return unix.Getdents(f.file, *buf) })
	if err != nil {
		return err
	}
	begin, end := len(e.b), len(e.b)+most
	for b := (*buf)[:n]; len(b) >= direntFixed; {
		size := int(binary.NativeEndian.Uint16(b[16:]))
		if size < direntFixed || size > len(b) {
			return unix.EIO
		}
		if !c.entry(st.Dev, b[:size], end, e) {
			// The rest is for the next request, from where this one ends.
			f.cookie = -1
			if len(e.b) == begin {
				return unix.EINVAL
			}
			return nil
		}
		f.cookie = int64(binary.NativeEndian.Uint64(b[8:]))
		b = b[size:]
	}
	return nil
}

// entry appends one entry, and reports false if it does not fit before end.
func (c *session) entry(dev uint64, b []byte, end int, e *encoder) bool {
	name, _, _ := bytes.Cut(b[direntFixed:], []byte{0})
	if len(e.b)+entryFixed+len(name) > end {
		return false
	}
	q := qid{typ: qidFile, path: c.s.inode(dev, binary.NativeEndian.Uint64(b))}
	switch b[18] {
	case unix.DT_DIR:
		q.typ = qidDir
	case unix.DT_LNK:
		q.typ = qidSymlink
	}
	e.qid(q)
	e.u64(binary.NativeEndian.Uint64(b[8:]))
	e.u8(b[18])
	e.string(string(name))
	return true
}
