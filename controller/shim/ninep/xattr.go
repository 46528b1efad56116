// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package ninep

import (
	"bytes"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// maxXattr bounds a value, and a list of names, as Linux does.
	maxXattr = 64 << 10
	// maxXattrs bounds what the fids of all attributes hold at a time, in bytes: a client
	// has one for as long as a call on an attribute takes.
	maxXattrs = 4 << 20
)

// xattr is an attribute, or the list of names, in a fid.
type xattr struct {
	value []byte
	// name, size and flags are those of one that is being written.
	name  string
	size  int
	flags int
	write bool
	// held is what it takes of the server's maxXattrs.
	held int64
}

// holdXattr takes room for an attribute's bytes. ENOMEM means that too many are held.
func (s *Server) holdXattr(x *xattr, bytes int) error {
	if s.xattrs.Add(int64(bytes)) > maxXattrs {
		s.xattrs.Add(-int64(bytes))
		return unix.ENOMEM
	}
	x.held += int64(bytes)
	return nil
}

// carried tells which attributes a guest sees and sets: the users' own, capabilities of
// files, and access control lists. Others are for the host's security modules and file
// systems.
func carried(name string) bool {
	return strings.HasPrefix(name, "user.") || name == "security.capability" ||
		name == "system.posix_acl_access" || name == "system.posix_acl_default"
}

func (x *xattr) readAt(offset int64, count uint32) []byte {
	if x.write || offset >= int64(len(x.value)) {
		return nil
	}
	rest := x.value[offset:]
	return rest[:min(len(rest), int(count))]
}

// xattrwalk makes a fid to read an attribute by, or the names of all.
func (c *session) xattrwalk(r *request, e *encoder) error {
	from, to, name := r.u32(), r.u32(), r.string()
	if strings.ContainsRune(name, 0) {
		return unix.EINVAL
	}
	f, done, err := c.useNode(r, from)
	if err != nil {
		return err
	}
	defer done()
	var value []byte
	if name == "" {
		value, err = listXattrs(f.node)
	} else {
		value, err = getXattr(f.node, name)
	}
	if err != nil {
		return err
	}
	x := &xattr{value: value}
	if err := c.s.holdXattr(x, len(value)); err != nil {
		return err
	}
	if err := c.insert(to, &fid{node: f.node.get(), uid: f.uid, xattr: x}); err != nil {
		c.s.xattrs.Add(-x.held)
		return err
	}
	e.u64(uint64(len(value)))
	return nil
}

func getXattr(n *node, name string) ([]byte, error) {
	if !carried(name) {
		return nil, unix.ENODATA
	}
	buf := make([]byte, maxXattr)
	got, err := unix.Getxattr(n.procPath(), name, buf)
	if err != nil {
		return nil, err
	}
	return bytes.Clone(buf[:got]), nil
}

func listXattrs(n *node) ([]byte, error) {
	buf := make([]byte, maxXattr)
	got, err := unix.Listxattr(n.procPath(), buf)
	if err != nil {
		return nil, err
	}
	var out []byte
	for name := range bytes.SplitSeq(buf[:got], []byte{0}) {
		if carried(string(name)) {
			out = append(append(out, name...), 0)
		}
	}
	return out, nil
}

// xattrcreate makes of a fid one that an attribute is written by; the clunk sets it.
func (c *session) xattrcreate(r *request, _ *encoder) error {
	id, name, size, flags := r.u32(), r.string(), r.u64(), r.u32()
	if r.bad || name == "" || strings.ContainsRune(name, 0) {
		return unix.EINVAL
	}
	if size > maxXattr {
		return unix.E2BIG
	}
	if !carried(name) {
		return unix.EOPNOTSUPP
	}
	f, done, err := c.useNode(r, id)
	if err != nil {
		return err
	}
	defer done()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.file >= 0 || f.xattr != nil {
		return unix.EBADF
	}
	x := &xattr{name: name, size: int(size), flags: int(flags), write: true}
	if err := c.s.holdXattr(x, int(size)); err != nil {
		return err
	}
	f.xattr = x
	return nil
}

func (f *fid) writeXattr(offset int64, data []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	x := f.xattr
	if !x.write || offset != int64(len(x.value)) || len(x.value)+len(data) > x.size {
		return unix.EINVAL
	}
	if x.value == nil {
		x.value = make([]byte, 0, x.size)
	}
	x.value = append(x.value, data...)
	return nil
}

// commit sets the attribute that was written. An empty one that has to be there is
// removed: the protocol has no other way.
func (f *fid) commit() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	x := f.xattr
	switch {
	case x == nil || !x.write:
		return nil
	case len(x.value) != x.size:
		return unix.EINVAL
	case x.size == 0 && x.flags == unix.XATTR_REPLACE:
		return unix.Removexattr(f.node.procPath(), x.name)
	}
	return unix.Setxattr(f.node.procPath(), x.name, x.value, x.flags)
}
