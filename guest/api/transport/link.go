// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package transport

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
)

const (
	headerSize = 12
	// maxFrame is the longest frame, all included. It is a reader's buffer on
	// each side, and a virtio-serial port takes at most 32 KiB in one write.
	maxFrame = 16 << 10
	maxBody  = maxFrame - headerSize - 1
	// trailer follows each frame. A torn frame that a preamble's padding
	// completes does not end with it.
	trailer = 0
	// window is how much of a stream may be on its way or unread.
	window = 256 << 10
	// backlog bounds the streams that the guest has not taken yet.
	backlog = 256
)

// The parts of yamux's header: version, type, flags (2 bytes), stream ID (4),
// length (4).
const (
	typeData         = 0
	typeWindowUpdate = 1

	flagSYN = 1
	flagACK = 2
	flagFIN = 4
	flagRST = 8
)

// errFrame means that the bytes at hand are no frame that the peer may send. On
// the guest's side it is a new host's preamble. They stay unread.
var errFrame = errors.New("unexpected frame")

// link is the connection below a yamux session. It lets whole frames through,
// in both directions, after looking at them.
type link struct {
	r     *bufio.Reader // holds a whole frame
	w     io.Writer
	close func() error // makes r and w fail at once
	// allowSYN is set on the guest's side.
	allowSYN bool

	// For yamux's reader only: what is left of the frame it is reading, whether a
	// trailer follows, and why reading ended.
	pending int
	trailed bool
	err     error

	wmu     sync.Mutex
	wbuf    []byte // a header whose body comes with the next Write
	retired bool

	mu        sync.Mutex
	conns     map[uint32]*Conn
	resetWait time.Duration
	lingering []*Conn     // on the host's side, in the order of their Close
	overdue   *time.Timer // set while too many of them linger

	// idle is on the host's side, for yamux's reader; sent are the bytes that were written.
	idle idleFrames
	sent atomic.Int64
}

func newLink(r *bufio.Reader, w io.Writer, closeFn func() error, guest bool) *link {
	return &link{r: r, w: w, close: closeFn, allowSYN: guest, conns: make(map[uint32]*Conn), resetWait: defaultResetWait}
}

// Read gives yamux the bytes of frames that passed the check. It waits only
// between frames: yamux holds a stream's lock while it reads a frame's body.
func (l *link) Read(p []byte) (int, error) {
	if l.pending == 0 {
		if err := l.next(); err != nil {
			l.err = err
			return 0, err
		}
	}
	if len(p) > l.pending {
		p = p[:l.pending]
	}
	n, err := l.r.Read(p)
	l.pending -= n
	return n, err
}

// next waits for a whole frame and checks it.
func (l *link) next() error {
	if l.trailed {
		if _, err := l.r.Discard(1); err != nil {
			return err
		}
		l.trailed = false
	}
	hdr, err := l.r.Peek(headerSize)
	if err != nil {
		return err
	}
	body, err := l.check(hdr)
	if err != nil {
		return err
	}
	flags, id := binary.BigEndian.Uint16(hdr[2:]), binary.BigEndian.Uint32(hdr[4:])
	frame, err := l.r.Peek(headerSize + body + 1)
	if err != nil {
		return err
	}
	if frame[headerSize+body] != trailer {
		return fmt.Errorf("%w: torn", errFrame)
	}
	l.pending, l.trailed = headerSize+body, true
	if !l.allowSYN && (body == 0 || !l.known(id)) {
		l.idle.one(l.sent.Load())
	}
	if flags&(flagFIN|flagRST) != 0 {
		l.ended(id, flags)
	}
	return nil
}

// known tells whether there is a stream of that number.
func (l *link) known(id uint32) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.conns[id] != nil
}

// check returns the length of the frame's body.
func (l *link) check(hdr []byte) (int, error) {
	version, typ := hdr[0], hdr[1]
	flags := binary.BigEndian.Uint16(hdr[2:])
	length := binary.BigEndian.Uint32(hdr[8:])
	known := uint16(flagACK | flagFIN | flagRST)
	if l.allowSYN {
		known |= flagSYN
	}
	switch {
	case version != 0, flags&^known != 0:
	case typ == typeData && length <= maxBody:
		return int(length), nil
	case typ == typeWindowUpdate && length <= 2*window:
		return 0, nil
	}
	return 0, fmt.Errorf("%w: header % x", errFrame, hdr)
}

// ended notes that the peer ended its direction of a stream, and answers a reset.
func (l *link) ended(id uint32, flags uint16) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.conns[id]
	if c == nil {
		return
	}
	l.unlinger(c)
	if flags&flagFIN != 0 {
		c.fin.Store(true)
	}
	if flags&flagRST != 0 {
		delete(l.conns, id)
		c.setOver()
		if c.reset.CompareAndSwap(false, true) {
			go l.writeReset(id)
		}
	}
}

// Write takes headers and bodies from yamux and sends each frame as one write.
func (l *link) Write(p []byte) (int, error) {
	l.wmu.Lock()
	defer l.wmu.Unlock()
	if l.retired {
		return 0, io.ErrClosedPipe
	}
	isHeader := len(l.wbuf) == 0
	l.wbuf = append(l.wbuf, p...)
	if isHeader && p[1] == typeData && binary.BigEndian.Uint32(p[8:]) > 0 {
		return len(p), nil
	}
	l.wbuf = append(l.wbuf, trailer)
	n, err := l.w.Write(l.wbuf)
	l.sent.Add(int64(n))
	l.wbuf = l.wbuf[:0]
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// retire ends writes for good, before another session uses the same device.
func (l *link) retire() {
	l.wmu.Lock()
	defer l.wmu.Unlock()
	l.retired = true
}

// Close ends reads and writes.
func (l *link) Close() error { return l.close() }

func (l *link) writeReset(id uint32) {
	hdr := make([]byte, headerSize+1)
	hdr[1] = typeWindowUpdate
	binary.BigEndian.PutUint16(hdr[2:], flagRST)
	binary.BigEndian.PutUint32(hdr[4:], id)
	l.wmu.Lock()
	defer l.wmu.Unlock()
	if l.retired {
		return
	}
	// A failure is the session's end, which yamux notices by itself.
	_, _ = l.w.Write(hdr)
}

func (l *link) add(c *Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns[c.stream.StreamID()] = c
}

// open is how many connections there are, closed ones whose peer has not ended
// them included.
func (l *link) open() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.conns)
}

// yamuxConfig leaves time limits to those who use the streams: a VM may be
// paused for long.
func yamuxConfig() *yamux.Config {
	const never = 10 * 365 * 24 * time.Hour
	return &yamux.Config{
		AcceptBacklog:          backlog,
		EnableKeepAlive:        false,
		KeepAliveInterval:      never,
		ConnectionWriteTimeout: never,
		MaxStreamWindowSize:    window,
		StreamOpenTimeout:      0,
		StreamCloseTimeout:     0,
		Logger:                 log.New(io.Discard, "", 0),
	}
}
