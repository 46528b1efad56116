// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package ninep

import (
	"sync"

	"golang.org/x/sys/unix"
)

// fid is a client's handle: of the server's root, of a file or directory, or of an
// extended attribute that is being read or written.
type fid struct {
	// node is nil for the server's root.
	node *node
	// uid owns what is made by this fid.
	uid uint32

	mu sync.Mutex // held while a request uses what follows
	// file is the open descriptor, -1 before Tlopen; node has it too.
	file int
	// cookie is the position of an open directory.
	cookie int64
	xattr  *xattr

	// refs counts the table's entry and requests; under session.mu.
	refs int
}

// contents are what a fid reads and writes: an attribute, or the open descriptor, -1 if
// there is none.
func (f *fid) contents() (*xattr, int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.xattr, f.file
}

// use finds a fid for a request and has its node's descriptors stay until done is called.
// It refuses a message that was too short for its fields.
func (c *session) use(r *request, id uint32) (f *fid, done func(), err error) {
	if r.bad {
		return nil, nil, unix.EINVAL
	}
	c.mu.Lock()
	f = c.fids[id]
	if f == nil {
		c.mu.Unlock()
		return nil, nil, unix.EBADF
	}
	f.refs++
	c.mu.Unlock()
	if f.node == nil {
		return f, func() { c.unref(f) }, nil
	}
	if err := f.node.begin(); err != nil {
		c.unref(f)
		return nil, nil, err
	}
	return f, func() {
		f.node.end()
		c.unref(f)
	}, nil
}

// useNode is use for what the server's root cannot do.
func (c *session) useNode(r *request, id uint32) (*fid, func(), error) {
	f, done, err := c.use(r, id)
	if err == nil && f.node == nil {
		done()
		return nil, nil, unix.EPERM
	}
	return f, done, err
}

// useDir is use for a directory in which a name is made or removed.
func (c *session) useDir(r *request, id uint32, name string) (*fid, func(), error) {
	if len(name) > maxName {
		return nil, nil, unix.ENAMETOOLONG
	}
	if !checkName(name) {
		return nil, nil, unix.EINVAL
	}
	f, done, err := c.useNode(r, id)
	if err == nil && !f.node.isDir() {
		done()
		return nil, nil, unix.ENOTDIR
	}
	return f, done, err
}

// unref gives a reference back. The last one ends the fid.
func (c *session) unref(f *fid) {
	c.mu.Lock()
	f.refs--
	last := f.refs == 0
	c.mu.Unlock()
	if !last {
		return
	}
	c.s.fids.Add(-1)
	if f.xattr != nil {
		c.s.xattrs.Add(-f.xattr.held)
	}
	if f.node == nil {
		return
	}
	if f.file >= 0 {
		f.node.drop(f.file)
	}
	f.node.put()
}

// insert enters a new fid. It takes the reference to node, also when it fails.
func (c *session) insert(id uint32, f *fid) error {
	f.refs, f.file = 1, -1
	c.mu.Lock()
	_, used := c.fids[id]
	err := error(nil)
	switch {
	case used || id == noFid:
		err = unix.EBADF
	case c.s.fids.Add(1) > int64(c.s.limits.Fids):
		c.s.fids.Add(-1)
		err = unix.ENFILE
	default:
		c.fids[id] = f
	}
	c.mu.Unlock()
	if err != nil && f.node != nil {
		f.node.put()
	}
	return err
}

func (c *session) take(id uint32) *fid {
	c.mu.Lock()
	defer c.mu.Unlock()
	f := c.fids[id]
	delete(c.fids, id)
	return f
}

func (c *session) clunkAll() {
	c.mu.Lock()
	all := c.fids
	c.fids = make(map[uint32]*fid)
	c.mu.Unlock()
	for _, f := range all {
		c.unref(f)
	}
}

// clunk ends a fid. An attribute that was written is set now.
func (c *session) clunk(r *request, _ *encoder) error {
	id := r.u32()
	if r.bad {
		return unix.EINVAL
	}
	f, done, err := c.use(r, id)
	if err == nil {
		err = f.commit()
		done()
	}
	if f := c.take(id); f != nil {
		c.unref(f)
		if err == unix.ESTALE { //nolint:errorlint // use's own: there is nothing to be said about a fid that goes
			err = nil
		}
	}
	return err
}

// remove ends a fid, and does not remove its file: Linux removes by Tunlinkat.
func (c *session) remove(r *request, _ *encoder) error {
	if f := c.take(r.u32()); f != nil {
		c.unref(f)
	}
	return unix.EOPNOTSUPP
}

// attach makes a fid of the server's root for a user.
func (c *session) attach(r *request, e *encoder) error {
	id, auth, _, name, uid := r.u32(), r.u32(), r.string(), r.string(), r.u32()
	if r.bad || auth != noFid || name != "" && name != "/" {
		return unix.EINVAL
	}
	if uid == noUID {
		uid = 0
	}
	if err := c.insert(id, &fid{uid: uid}); err != nil {
		return err
	}
	e.qid(rootQid)
	return nil
}

// rootQid is the server's root. No volume's root has its number: file systems begin
// theirs at 1 or later.
var rootQid = qid{typ: qidDir, path: 0}

// walk makes a fid of what is below another one.
func (c *session) walk(r *request, e *encoder) error {
	from, to, n := r.u32(), r.u32(), int(r.u16())
	if n > maxWalk {
		return unix.EINVAL
	}
	names := make([]string, n)
	for i := range names {
		names[i] = r.string()
	}
	f, done, err := c.use(r, from)
	if err != nil {
		return err
	}
	defer done()
	at, qids, err := c.walkNames(f.node, names)
	if err != nil && len(qids) == 0 {
		return err
	}
	e.u16(uint16(len(qids)))
	for _, q := range qids {
		e.qid(q)
	}
	if len(qids) < n {
		// As far as it went; there is no new fid.
		return nil
	}
	next := &fid{node: at, uid: f.uid}
	if from == to {
		c.unref(c.take(from))
	}
	return c.insert(to, next)
}

// walkNames follows names from a node, nil for the root, and returns a reference to where
// they lead. After an error it returns the qids of those that were found.
func (c *session) walkNames(from *node, names []string) (*node, []qid, error) {
	at := from
	if at != nil {
		at.get()
	}
	var qids []qid
	for _, name := range names {
		next, q, err := c.step(at, name)
		if at != nil {
			at.put()
		}
		if err != nil {
			return nil, qids, err
		}
		at, qids = next, append(qids, q)
	}
	return at, qids, nil
}

func (c *session) step(at *node, name string) (*node, qid, error) {
	if len(name) > maxName {
		return nil, qid{}, unix.ENAMETOOLONG
	}
	if !checkName(name) {
		return nil, qid{}, unix.EINVAL
	}
	if at == nil {
		e := c.s.export(name)
		if e == nil {
			return nil, qid{}, unix.ENOENT
		}
		return c.enter(e)
	}
	if err := at.begin(); err != nil {
		return nil, qid{}, err
	}
	defer at.end()
	next, st, err := lookUp(at, name)
	if err != nil {
		return nil, qid{}, err
	}
	return next, c.s.qidOf(st), nil
}

// enter returns a volume's root.
func (c *session) enter(e *Export) (*node, qid, error) {
	if err := e.root.begin(); err != nil {
		return nil, qid{}, err
	}
	defer e.root.end()
	st, err := statFD(e.root.fd)
	if err != nil {
		return nil, qid{}, err
	}
	return e.root.get(), c.s.qidOf(st), nil
}
