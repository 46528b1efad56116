// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package ninep

import (
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// node is an inode of a volume that fids hold: an O_PATH descriptor, and one more in the
// fid that has opened it. It lives while there are references; kill ends what it holds
// before that, as soon as no request uses it.
type node struct {
	export *Export
	// fd is never used without begin.
	fd   int
	mode uint32 // of which the type stays

	mu   sync.Mutex
	refs int
	busy int
	dead bool
	// opened are the descriptors of fids that have opened the node.
	opened map[int]struct{}
}

func newNode(e *Export, fd int, st *unix.Stat_t) *node {
	n := &node{export: e, fd: fd, mode: st.Mode, refs: 1}
	e.mu.Lock()
	e.nodes[n] = struct{}{}
	gone := e.gone
	e.mu.Unlock()
	if gone {
		n.kill()
	}
	return n
}

func (n *node) isDir() bool { return n.mode&unix.S_IFMT == unix.S_IFDIR }

func (n *node) get() *node {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.refs++
	return n
}

func (n *node) put() {
	n.mu.Lock()
	n.refs--
	last := n.refs == 0
	if last {
		n.dead = true
		n.release()
	}
	n.mu.Unlock()
	if last {
		n.export.mu.Lock()
		delete(n.export.nodes, n)
		n.export.mu.Unlock()
	}
}

// kill ends the node before its last reference has gone.
func (n *node) kill() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.dead = true
	n.release()
}

// release closes what a dead node holds, unless a request uses it. n.mu is held.
func (n *node) release() {
	if !n.dead || n.busy > 0 || n.fd < 0 {
		return
	}
	_ = unix.Close(n.fd)
	n.fd = -1
	for fd := range n.opened {
		_ = unix.Close(fd)
	}
	n.opened = nil
}

// begin lets a request use the node's descriptors until end.
func (n *node) begin() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.dead {
		return unix.ESTALE
	}
	n.busy++
	return nil
}

func (n *node) end() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.busy--
	n.release()
}

// keep makes an open descriptor of the node's its own. Only between begin and end.
func (n *node) keep(fd int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.opened == nil {
		n.opened = make(map[int]struct{})
	}
	n.opened[fd] = struct{}{}
}

// drop closes an open descriptor, if it is still there.
func (n *node) drop(fd int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, ok := n.opened[fd]; ok {
		delete(n.opened, fd)
		_ = unix.Close(fd)
	}
}

// procPath names the inode to system calls that take no O_PATH descriptor.
func (n *node) procPath() string { return procPath(n.fd) }

func procPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// confined is how names are looked up: within their directory, and by no link.
const confined = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS

// openBeneath opens a single name of a directory.
func openBeneath(dir int, name string, flags int, mode uint32) (int, error) {
	how := &unix.OpenHow{Flags: uint64(flags | unix.O_CLOEXEC | unix.O_NOFOLLOW), Mode: uint64(mode), Resolve: confined}
	for {
		fd, err := unix.Openat2(dir, name, how)
		// EAGAIN: something was renamed meanwhile, and the kernel cannot tell.
		if err != unix.EINTR && err != unix.EAGAIN { //nolint:errorlint // a system call's own
			return fd, err
		}
	}
}

// lookUp finds a name of a directory node, which is in use.
func lookUp(dir *node, name string) (*node, *unix.Stat_t, error) {
	if !dir.isDir() {
		return nil, nil, unix.ENOTDIR
	}
	fd, err := openBeneath(dir.fd, name, unix.O_PATH, 0)
	if err != nil {
		return nil, nil, notFollowed(err)
	}
	st, err := statFD(fd)
	if err != nil {
		_ = unix.Close(fd)
		return nil, nil, err
	}
	return newNode(dir.export, fd, st), st, nil
}

// notFollowed is the error of a name that must not be a link.
func notFollowed(err error) error {
	if err == unix.EXDEV { //nolint:errorlint // a system call's own
		return unix.EACCES
	}
	return err
}

func statFD(fd int) (*unix.Stat_t, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(fd, "", &st, unix.AT_EMPTY_PATH); err != nil {
		return nil, err
	}
	return &st, nil
}

func (s *Server) qidOf(st *unix.Stat_t) qid {
	q := qid{typ: qidFile, path: s.inode(st.Dev, st.Ino)}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		q.typ = qidDir
	case unix.S_IFLNK:
		q.typ = qidSymlink
	}
	return q
}

// opens tells whether the host opens such a file for a guest.
func opens(mode uint32) bool {
	typ := mode & unix.S_IFMT
	return typ == unix.S_IFREG || typ == unix.S_IFDIR
}

// checkName accepts one component of a path.
func checkName(name string) bool {
	return name != "" && name != "." && name != ".." && len(name) <= maxName && !strings.ContainsAny(name, "/\x00")
}
