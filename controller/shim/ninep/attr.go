// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package ninep

import (
	"golang.org/x/sys/unix"
)

// permissions are the bits of a mode that chmod sets.
const permissions = 0o7777

// attrBasic are the fields that Rgetattr has: all but birth time, generation and version.
const attrBasic = 0x7ff

// blockBytes is the block size that regular files show: programs read and write in such
// pieces, and each costs a message.
const blockBytes = 64 << 10

// getattr tells what stat tells.
func (c *session) getattr(r *request, e *encoder) error {
	id, _ := r.u32(), r.u64()
	f, done, err := c.use(r, id)
	if err != nil {
		return err
	}
	defer done()
	if f.node == nil {
		encodeAttr(e, rootQid, &unix.Stat_t{Mode: unix.S_IFDIR | 0o711, Nlink: 2})
		return nil
	}
	st, err := statFD(f.node.fd)
	if err != nil {
		return err
	}
	encodeAttr(e, c.s.qidOf(st), st)
	return nil
}

func encodeAttr(e *encoder, q qid, st *unix.Stat_t) {
	block := uint64(st.Blksize)
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		block = max(block, blockBytes)
	}
	e.u64(attrBasic)
	e.qid(q)
	e.u32(st.Mode)
	e.u32(st.Uid)
	e.u32(st.Gid)
	links := uint64(st.Nlink) //nolint:unconvert // 32 bits on other processors
	for _, v := range []uint64{links, st.Rdev, uint64(st.Size), block, uint64(st.Blocks)} {
		e.u64(v)
	}
	for _, t := range []unix.Timespec{st.Atim, st.Mtim, st.Ctim, {}} {
		e.u64(uint64(t.Sec))
		e.u64(uint64(t.Nsec))
	}
	e.u64(0)
	e.u64(0)
}

// Fields that Tsetattr sets.
const (
	setMode     = 0x1
	setUID      = 0x2
	setGID      = 0x4
	setSize     = 0x8
	setAtime    = 0x10
	setMtime    = 0x20
	setAtimeVal = 0x80
	setMtimeVal = 0x100
)

// setattr is chmod, chown, truncate and utimes.
func (c *session) setattr(r *request, _ *encoder) error {
	id, valid, mode, uid, gid, size := r.u32(), r.u32(), r.u32(), r.u32(), r.u32(), r.offset()
	atime := unix.Timespec{Sec: int64(r.u64()), Nsec: int64(r.u64())}
	mtime := unix.Timespec{Sec: int64(r.u64()), Nsec: int64(r.u64())}
	f, done, err := c.useNode(r, id)
	if err != nil {
		return err
	}
	defer done()
	if valid&setSize != 0 {
		if err := f.truncate(size); err != nil {
			return err
		}
	}
	if valid&(setUID|setGID) != 0 {
		if err := unix.Fchownat(f.node.fd, "", unchanged(valid, setUID, uid), unchanged(valid, setGID, gid), unix.AT_EMPTY_PATH); err != nil {
			return err
		}
	}
	// After chown, which clears bits.
	if valid&setMode != 0 {
		if f.node.mode&unix.S_IFMT == unix.S_IFLNK {
			return unix.EOPNOTSUPP
		}
		if err := unix.Chmod(f.node.procPath(), mode&permissions); err != nil {
			return err
		}
	}
	if valid&(setAtime|setMtime) == 0 {
		return nil
	}
	times := []unix.Timespec{timeOf(valid, setAtime, setAtimeVal, atime), timeOf(valid, setMtime, setMtimeVal, mtime)}
	return unix.UtimesNanoAt(f.node.fd, "", times, unix.AT_EMPTY_PATH)
}

func unchanged(valid, bit, id uint32) int {
	if valid&bit == 0 {
		return -1
	}
	return int(id)
}

// timeOf is a field of utimensat.
func timeOf(valid, set, value uint32, t unix.Timespec) unix.Timespec {
	switch {
	case valid&set == 0:
		return unix.Timespec{Nsec: unix.UTIME_OMIT}
	case valid&value == 0 || t.Nsec < 0 || t.Nsec >= 1e9:
		return unix.Timespec{Nsec: unix.UTIME_NOW}
	}
	return t
}

// truncate goes by the open file if there is one: the mode may forbid it otherwise.
func (f *fid) truncate(size int64) error {
	_, fd := f.contents()
	if fd >= 0 {
		if err := unix.Ftruncate(fd, size); err != unix.EINVAL { //nolint:errorlint // a system call's own; EINVAL: open for reading
			return err
		}
	}
	if f.node.mode&unix.S_IFMT != unix.S_IFREG {
		return unix.EINVAL
	}
	return unix.Truncate(f.node.procPath(), size)
}

// own gives what was just made to its user, with the mode that was asked, whatever the
// umask is here. path leads to fd's inode, and is empty for a symbolic link.
func own(fd int, path string, mode, uid, gid uint32) error {
	group := int(gid)
	if gid == noUID {
		group = -1
	}
	if err := unix.Fchownat(fd, "", int(uid), group, unix.AT_EMPTY_PATH); err != nil {
		return err
	}
	if path == "" {
		return nil
	}
	return unix.Chmod(path, mode&permissions)
}

// statfs tells about the volume's file system.
func (c *session) statfs(r *request, e *encoder) error {
	f, done, err := c.use(r, r.u32())
	if err != nil {
		return err
	}
	defer done()
	st := unix.Statfs_t{Type: unix.V9FS_MAGIC, Bsize: 4096, Namelen: maxName}
	if f.node != nil {
		if err := unix.Fstatfs(f.node.fd, &st); err != nil {
			return err
		}
	}
	e.u32(uint32(st.Type))
	e.u32(uint32(st.Bsize))
	for _, v := range []uint64{st.Blocks, st.Bfree, st.Bavail, st.Files, st.Ffree} {
		e.u64(v)
	}
	e.u64(uint64(uint32(st.Fsid.Val[0])) | uint64(uint32(st.Fsid.Val[1]))<<32)
	e.u32(uint32(st.Namelen))
	return nil
}

// readlink reads a symbolic link, which the guest follows.
func (c *session) readlink(r *request, e *encoder) error {
	f, done, err := c.useNode(r, r.u32())
	if err != nil {
		return err
	}
	defer done()
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(f.node.fd, "", buf)
	if err != nil {
		return err
	}
	e.string(string(buf[:n]))
	return nil
}
