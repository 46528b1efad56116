// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package ninep

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Limits bound what one client can take. Zero values are the defaults.
type Limits struct {
	// MessageBytes is the largest message; 128 KiB.
	MessageBytes uint32
	// Fids is how many files, directories and attributes can be held; 65536, and at
	// most half of what the process may open.
	Fids int
	// Requests is how many are under way at once; 32. The client waits beyond.
	Requests int
}

// DefaultMessageBytes is the size of messages, header and all. It is Linux's own default,
// as the guest needs that much memory in one piece for a message.
const DefaultMessageBytes = 128 << 10

const (
	minMessageBytes = 4 << 10
	defaultFids     = 65536
	defaultRequests = 32
)

func (l Limits) withDefaults() Limits {
	if l.MessageBytes == 0 {
		l.MessageBytes = DefaultMessageBytes
	}
	if l.Requests == 0 {
		l.Requests = defaultRequests
	}
	if l.Fids == 0 {
		l.Fids = defaultFids
		var most unix.Rlimit
		if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &most); err == nil && most.Cur/2 < defaultFids {
			l.Fids = int(most.Cur / 2)
		}
	}
	return l
}

// Server has the volumes of one pod. Its methods may be called concurrently.
type Server struct {
	limits Limits
	fids   atomic.Int64
	// xattrs are the bytes of attributes that fids hold.
	xattrs atomic.Int64

	mu      sync.Mutex
	exports map[string]*Export
	// devices numbers the file systems that were seen, for unique inode numbers.
	devices map[uint64]uint64
}

// NewServer makes a server without volumes.
func NewServer(limits Limits) *Server {
	return &Server{
		limits:  limits.withDefaults(),
		exports: make(map[string]*Export),
		devices: make(map[uint64]uint64),
	}
}

// Export is a volume: an entry of the server's root.
type Export struct {
	root  *node
	maker Maker

	mu sync.Mutex
	// gone is true after Remove; nodes are those that live.
	gone  bool
	nodes map[*node]struct{}
}

// Add makes the file or directory that fd stands for an entry of the root, in which maker
// makes files. fd may be an O_PATH one, and is the server's from here on, also after an
// error. ErrAlreadyExists means that there is such an entry.
func (s *Server) Add(name string, fd int, maker Maker) error {
	st, err := statFD(fd)
	if err == nil && !checkName(name) {
		err = fmt.Errorf("volume name is %q: want a file name: %w", name, errdefs.ErrInvalidArgument)
	}
	if err == nil && !opens(st.Mode) {
		err = fmt.Errorf("volume %s is neither a regular file nor a directory: %w", name, errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil && s.exports[name] != nil {
		err = fmt.Errorf("volume %s: %w", name, errdefs.ErrAlreadyExists)
	}
	if err != nil {
		return errors.Join(err, unix.Close(fd))
	}
	e := &Export{maker: maker, nodes: make(map[*node]struct{})}
	e.root = newNode(e, fd, st)
	s.exports[name] = e
	return nil
}

// Remove takes an entry away. What the client still holds of it gives ESTALE, and no file
// descriptor of it is left once the requests that are under way have ended.
func (s *Server) Remove(name string) {
	s.mu.Lock()
	e := s.exports[name]
	delete(s.exports, name)
	s.mu.Unlock()
	if e != nil {
		e.remove()
	}
}

// Close removes all entries.
func (s *Server) Close() {
	s.mu.Lock()
	all := s.exports
	s.exports = make(map[string]*Export)
	s.mu.Unlock()
	for _, e := range all {
		e.remove()
	}
}

func (e *Export) remove() {
	e.mu.Lock()
	e.gone = true
	all := make([]*node, 0, len(e.nodes))
	for n := range e.nodes {
		all = append(all, n)
	}
	e.mu.Unlock()
	for _, n := range all {
		n.kill()
	}
	e.root.put()
}

func (s *Server) export(name string) *Export {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.exports[name]
}

// deviceShift leaves room for inode numbers below a file system's number.
const deviceShift = 48

// inode is a number that no other inode of the pod's volumes has, as they are one file
// system in the guest. The first file system's numbers are the host's.
func (s *Server) inode(dev, ino uint64) uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, ok := s.devices[dev]
	if !ok {
		n = uint64(len(s.devices))
		s.devices[dev] = n
	}
	return ino ^ n<<deviceShift
}
