// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package ninep

import (
	"errors"

	"golang.org/x/sys/unix"
)

// Flags of Tlopen and Tlcreate, which are the protocol's on every architecture.
const (
	openAccess  = 0o3
	openExcl    = 0o200
	openTrunc   = 0o1000
	openAppend  = 0o2000
	openDsync   = 0o10000
	openNoatime = 0o1000000
	openSync    = 0o4000000
)

// openFlags are a client's, for the host. What is not here means nothing, or something
// in the guest only.
func openFlags(in uint32) int {
	out := int(in & openAccess)
	for _, f := range []struct {
		in  uint32
		out int
	}{
		{openTrunc, unix.O_TRUNC},
		{openAppend, unix.O_APPEND},
		{openDsync, unix.O_DSYNC},
		{openSync, unix.O_SYNC},
		{openNoatime, unix.O_NOATIME},
	} {
		if in&f.in == f.in {
			out |= f.out
		}
	}
	// O_NONBLOCK: a lease of somebody's on the host is his to give up, not ours to await.
	return out | unix.O_NOCTTY | unix.O_NONBLOCK | unix.O_CLOEXEC
}

// lopen opens a file or directory for reading and writing.
func (c *session) lopen(r *request, e *encoder) error {
	id, flags := r.u32(), r.u32()
	f, done, err := c.use(r, id)
	if err != nil {
		return err
	}
	defer done()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.node == nil {
		e.qid(rootQid)
		e.u32(0)
		return nil
	}
	if f.file >= 0 || f.xattr != nil {
		return unix.EBADF
	}
	fd, err := f.node.open(flags)
	if err != nil {
		return err
	}
	return c.opened(f, fd, e)
}

// opened makes fd that of a fid, and answers.
func (c *session) opened(f *fid, fd int, e *encoder) error {
	st, err := statFD(fd)
	if err != nil {
		_ = unix.Close(fd)
		return err
	}
	f.node.keep(fd)
	f.file = fd
	e.qid(c.s.qidOf(st))
	e.u32(0)
	return nil
}

func (n *node) open(flags uint32) (int, error) {
	switch {
	case n.isDir():
		if flags&openAccess != unix.O_RDONLY {
			return -1, unix.EISDIR
		}
		return openBeneath(n.fd, ".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	case n.mode&unix.S_IFMT == unix.S_IFLNK:
		return -1, unix.ELOOP
	case !opens(n.mode):
		return -1, unix.ENXIO
	}
	return openRetried(func() (int, error) { return unix.Open(n.procPath(), openFlags(flags), 0) })
}

func openRetried(open func() (int, error)) (int, error) {
	for {
		fd, err := open()
		if err != unix.EINTR { //nolint:errorlint // a system call's own
			return fd, err
		}
	}
}

// lcreate makes a file, or opens one that somebody has made meanwhile, and has the
// directory's fid stand for it.
func (c *session) lcreate(r *request, e *encoder) error {
	id, name, flags, mode, gid := r.u32(), r.string(), r.u32(), r.u32(), r.u32()
	dir, done, err := c.useDir(r, id, name)
	if err != nil {
		return err
	}
	defer done()
	fd, err := create(dir.node, name, flags, mode, dir.uid, gid)
	if err != nil {
		return err
	}
	st, err := statFD(fd)
	if err != nil {
		_ = unix.Close(fd)
		return err
	}
	path, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		_ = unix.Close(fd)
		return err
	}
	// The node's own descriptor is as good as an O_PATH one.
	f := &fid{node: newNode(dir.node.export, path, st), uid: dir.uid}
	if err := f.node.begin(); err != nil {
		_ = unix.Close(fd)
		f.node.put()
		return err
	}
	defer f.node.end()
	if old := c.take(id); old != nil {
		c.unref(old)
	}
	if err := c.insert(id, f); err != nil {
		_ = unix.Close(fd)
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return c.opened(f, fd, e)
}

// create opens a name of a directory that is in use, and makes it if it is not there.
func create(dir *node, name string, flags, mode, uid, gid uint32) (int, error) {
	fd := -1
	err := dir.export.maker.do(func() (err error) {
		fd, err = openBeneath(dir.fd, name, openFlags(flags)|unix.O_CREAT|unix.O_EXCL, mode&permissions)
		return err
	})
	if err == unix.EEXIST && flags&openExcl == 0 { //nolint:errorlint // a system call's own
		// It is somebody's, whose it stays.
		n, _, err := lookUp(dir, name)
		if err != nil {
			return -1, err
		}
		defer n.put()
		return n.open(flags)
	}
	if err != nil {
		return -1, notFollowed(err)
	}
	if err := own(fd, procPath(fd), mode, uid, gid); err != nil {
		_ = unix.Close(fd)
		_ = unix.Unlinkat(dir.fd, name, 0)
		return -1, err
	}
	return fd, nil
}

// read reads a file or an attribute.
func (c *session) read(r *request, e *encoder) error {
	id, offset, count := r.u32(), r.offset(), r.u32()
	f, done, err := c.use(r, id)
	if err != nil {
		return err
	}
	defer done()
	const before = headerBytes + 4
	count = min(count, c.msize-before)
	value, fd := f.contents()
	if value != nil {
		part := value.readAt(offset, count)
		e.u32(uint32(len(part)))
		e.b = append(e.b, part...)
		return nil
	}
	if fd < 0 {
		return unix.EBADF
	}
	at := len(e.b)
	e.u32(0)
	buf := e.room(int(count))
	n, err := retried(func() (int, error) { return unix.Pread(fd, buf, offset) })
	if err != nil {
		return err
	}
	e.b = e.b[:at]
	e.u32(uint32(n))
	e.b = e.b[:at+4+n]
	return nil
}

// room returns the n bytes that follow what was encoded.
func (e *encoder) room(n int) []byte {
	at := len(e.b)
	if cap(e.b) < at+n {
		grown := getBuffer(at + n)
		copy(*grown, e.b)
		e.b = *grown
	}
	return e.b[at : at+n : at+n]
}

func retried(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if err != unix.EINTR { //nolint:errorlint // a system call's own
			return n, err
		}
	}
}

// writeFile writes a file or an attribute.
func (c *session) writeFile(r *request, e *encoder) error {
	id, offset, count := r.u32(), r.offset(), r.u32()
	data := r.take(int(count))
	f, done, err := c.use(r, id)
	if err != nil {
		return err
	}
	defer done()
	value, fd := f.contents()
	if value != nil {
		if err := f.writeXattr(offset, data); err != nil {
			return err
		}
		e.u32(count)
		return nil
	}
	if fd < 0 {
		return unix.EBADF
	}
	n, err := retried(func() (int, error) { return unix.Pwrite(fd, data, offset) })
	if errors.Is(err, unix.EDQUOT) {
		// Of a write's errors Linux's client remembers which it was of ENOSPC alone: any other
		// is EIO to the next write (mapping_set_error in its include/linux/pagemap.h).
		return unix.ENOSPC
	}
	if err != nil {
		return err
	}
	e.u32(uint32(n))
	return nil
}

// fsync has what was written reach the host's disk.
func (c *session) fsync(r *request, _ *encoder) error {
	id := r.u32()
	// Older clients do not say whether the data are enough.
	data := uint32(0)
	if len(r.b) >= 4 {
		data = r.u32()
	}
	f, done, err := c.useNode(r, id)
	if err != nil {
		return err
	}
	defer done()
	_, fd := f.contents()
	if fd < 0 {
		return unix.EBADF
	}
	if data != 0 {
		return unix.Fdatasync(fd)
	}
	return unix.Fsync(fd)
}

// Answers of Tlock and Tgetlock: locks are the guest's own, among the pod's containers.
const (
	lockSuccess = 0
	lockNone    = 2
)

func (c *session) lock(r *request, e *encoder) error {
	_, done, err := c.useNode(r, r.u32())
	if err != nil {
		return err
	}
	done()
	e.u8(lockSuccess)
	return nil
}

func (c *session) getlock(r *request, e *encoder) error {
	id, typ, start, length, pid, client := r.u32(), r.u8(), r.u64(), r.u64(), r.u32(), r.string()
	if typ > lockNone {
		return unix.EINVAL
	}
	_, done, err := c.useNode(r, id)
	if err != nil {
		return err
	}
	done()
	e.u8(lockNone)
	e.u64(start)
	e.u64(length)
	e.u32(pid)
	e.string(client)
	return nil
}
