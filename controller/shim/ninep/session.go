// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package ninep

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// readAhead is the buffer of a connection's reader.
const readAhead = 4096

// session is one connection.
type session struct {
	s *Server
	r *bufio.Reader
	w io.Writer
	// slots has a token for each request under way.
	slots   chan struct{}
	running sync.WaitGroup

	wmu sync.Mutex // held while an answer is written
	err error      // of the first that failed; under wmu

	// msize is the largest message, either way; 0 before the version is agreed.
	msize uint32

	mu   sync.Mutex
	fids map[uint32]*fid
	tags map[uint16]chan struct{} // closed when the tag's request was answered
}

// request is one message.
type request struct {
	typ  uint8
	tag  uint16
	body *[]byte
	// flushed is closed when the request that a Tflush is about was answered; nil if it is
	// none, or was.
	flushed <-chan struct{}
	decoder
}

// Serve answers one client until conn ends, and closes it. All fids are gone then.
// io.EOF is no error.
func (s *Server) Serve(conn io.ReadWriteCloser) error {
	c := &session{
		s: s, r: bufio.NewReaderSize(conn, readAhead), w: conn,
		slots: make(chan struct{}, s.limits.Requests),
		fids:  make(map[uint32]*fid), tags: make(map[uint16]chan struct{}),
	}
	err := c.run()
	// It ends answers that nobody takes.
	_ = conn.Close()
	c.running.Wait()
	c.clunkAll()
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func (c *session) run() error {
	for {
		r, err := c.receive()
		if err != nil {
			return err
		}
		if r.typ == tVersion {
			if err := c.version(r); err != nil {
				return err
			}
			continue
		}
		if c.msize == 0 {
			return fmt.Errorf("message %d before a version was agreed: %w", r.typ, errdefs.ErrInvalidArgument)
		}
		done, err := c.start(r)
		if err != nil {
			return err
		}
		c.slots <- struct{}{}
		c.running.Go(func() {
			defer func() { <-c.slots }()
			c.answer(r, done)
		})
	}
}

// receive reads a message. An error ends the connection.
func (c *session) receive() (*request, error) {
	var h [headerBytes]byte
	if _, err := io.ReadFull(c.r, h[:]); err != nil {
		return nil, fmt.Errorf("read a message: %w", err)
	}
	size, most := binary.LittleEndian.Uint32(h[:]), c.msize
	if most == 0 {
		most = minMessageBytes
	}
	if size < headerBytes || size > most {
		return nil, fmt.Errorf("a message of %d bytes: want %d to %d: %w", size, headerBytes, most, errdefs.ErrInvalidArgument)
	}
	r := &request{typ: h[4], tag: binary.LittleEndian.Uint16(h[5:]), body: getBuffer(int(size) - headerBytes)}
	r.b = *r.body
	if _, err := io.ReadFull(c.r, r.b); err != nil {
		return nil, fmt.Errorf("read a message: %w", err)
	}
	return r, nil
}

// version agrees on one and begins anew: no request is under way after it, and no fid left.
func (c *session) version(r *request) error {
	c.running.Wait()
	c.clunkAll()
	msize, name := r.u32(), r.string()
	if r.bad || msize < minMessageBytes {
		return fmt.Errorf("version with messages of %d bytes: want at least %d: %w", msize, minMessageBytes, errdefs.ErrInvalidArgument)
	}
	var e encoder
	e.begin(tVersion+1, r.tag)
	if name != version {
		c.msize, name = 0, "unknown"
	} else {
		c.msize = min(msize, c.s.limits.MessageBytes)
		name = version
	}
	e.u32(min(msize, c.s.limits.MessageBytes))
	e.string(name)
	putBuffer(r.body)
	return c.write(e.finish())
}

// start notes a tag as in use. What a Tflush waits for is found here, in the order of the
// messages: so it has come before, and no two of them wait for each other.
func (c *session) start(r *request) (chan struct{}, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, used := c.tags[r.tag]; used || r.tag == noTag {
		return nil, fmt.Errorf("tag %d is in use: want another one: %w", r.tag, errdefs.ErrInvalidArgument)
	}
	if r.typ == tFlush {
		r.flushed = c.tags[r.u16()]
	}
	done := make(chan struct{})
	c.tags[r.tag] = done
	return done, nil
}

// answer handles a request and sends what comes of it.
func (c *session) answer(r *request, done chan struct{}) {
	out := getBuffer(0)
	e := &encoder{b: *out}
	e.begin(r.typ+1, r.tag)
	if err := c.handle(r, e); err != nil {
		e.begin(tLerror+1, r.tag)
		e.u32(uint32(errnoOf(err)))
	}
	putBuffer(r.body)
	// The client may use the tag again as soon as it has the answer.
	c.mu.Lock()
	delete(c.tags, r.tag)
	c.mu.Unlock()
	// An error is the next read's too.
	_ = c.write(e.finish())
	close(done)
	*out = e.b
	putBuffer(out)
}

func (c *session) write(b []byte) error {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	if c.err == nil {
		_, c.err = c.w.Write(b)
	}
	return c.err
}

// flush waits until a request was answered: none is given up half-way.
func (*session) flush(r *request, _ *encoder) error {
	if r.bad {
		return unix.EINVAL
	}
	if r.flushed != nil {
		<-r.flushed
	}
	return nil
}

func errnoOf(err error) unix.Errno {
	if errno, ok := errors.AsType[unix.Errno](err); ok {
		return errno
	}
	return unix.EIO
}

// handlers answer the messages after the version.
var handlers = map[uint8]func(*session, *request, *encoder) error{
	tStatfs: (*session).statfs, tLopen: (*session).lopen, tLcreate: (*session).lcreate, tSymlink: (*session).symlink,
	tMknod: (*session).mknod, tReadlink: (*session).readlink, tGetattr: (*session).getattr, tSetattr: (*session).setattr,
	tXattrwalk: (*session).xattrwalk, tXattrcreate: (*session).xattrcreate, tReaddir: (*session).readdir,
	tFsync: (*session).fsync, tLock: (*session).lock, tGetlock: (*session).getlock, tLink: (*session).link,
	tMkdir: (*session).mkdir, tRenameat: (*session).renameat, tUnlinkat: (*session).unlinkat, tAttach: (*session).attach,
	tFlush: (*session).flush, tWalk: (*session).walk, tRead: (*session).read, tWrite: (*session).writeFile,
	tClunk: (*session).clunk, tRemove: (*session).remove,
}

// handle does what a message asks for. Tauth, and Trename, for which Linux has Trenameat
// since long, are not supported.
func (c *session) handle(r *request, e *encoder) error {
	h := handlers[r.typ]
	if h == nil {
		return unix.EOPNOTSUPP
	}
	return h(c, r, e)
}

// smallBuffer is what most messages fit into.
const smallBuffer = 512

var (
	smallBuffers = sync.Pool{New: func() any { b := make([]byte, 0, smallBuffer); return &b }}
	largeBuffers = sync.Pool{New: func() any { b := make([]byte, 0, DefaultMessageBytes); return &b }}
)

// getBuffer returns a buffer of n bytes.
func getBuffer(n int) *[]byte {
	var b *[]byte
	switch {
	case n <= smallBuffer:
		b = smallBuffers.Get().(*[]byte)
	case n <= DefaultMessageBytes:
		b = largeBuffers.Get().(*[]byte)
	default:
		s := make([]byte, 0, n)
		b = &s
	}
	*b = (*b)[:n]
	return b
}

func putBuffer(b *[]byte) {
	switch c := cap(*b); {
	case c >= DefaultMessageBytes:
		largeBuffers.Put(b)
	case c >= smallBuffer:
		smallBuffers.Put(b)
	}
}
