// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package stdio

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	runc "github.com/containerd/go-runc"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// linger is how long a terminal may still bring output when its process has
// ended: what the process wrote is there by then, and a child that lives on and
// holds the terminal must not keep the stream open, as with runc.
const linger = 200 * time.Millisecond

// Config names the streams of a process; an empty ID is a stream not wanted.
type Config struct {
	Stdin, Stdout, Stderr string
	Terminal              bool
}

// IO is the input and output of one process.
//
// A stream of output ends when the last process that holds the pipe's other end
// has closed it, be it after the exit of the one it was made for, or at Close.
// Input ends when the host closes its half of the stream. When the host is lost,
// the VM is about to be destroyed; until then nothing here ends a process: its
// output blocks when the pipe is full, and its input stays open and silent.
type IO struct {
	in, out, err *stream
	terminal     bool

	// child are the process's ends, given to crun and closed after its start.
	child [3]*os.File
	// ours are the other ends.
	stdin, stdout, stderr *os.File

	mu     sync.Mutex
	pty    *os.File
	closed bool
	// output counts the copies of output that go on; drained is closed when there are none.
	output  sync.WaitGroup
	drained chan struct{}
	// quit is closed by Close.
	quit chan struct{}
}

// Open takes the streams and makes the pipes. The streams are gone after a
// failure: the host sees them end.
func Open(streams *Streams, cfg Config) (_ *IO, retErr error) {
	if cfg.Terminal && cfg.Stderr != "" {
		return nil, fmt.Errorf("stderr stream with a terminal: %w", errdefs.ErrInvalidArgument)
	}
	p := &IO{terminal: cfg.Terminal, drained: make(chan struct{}), quit: make(chan struct{})}
	defer func() {
		if retErr != nil {
			p.Close()
		}
	}()
	for _, s := range []struct {
		id string
		to **stream
	}{{cfg.Stdin, &p.in}, {cfg.Stdout, &p.out}, {cfg.Stderr, &p.err}} {
		if s.id == "" {
			continue
		}
		var err error
		if *s.to, err = streams.take(s.id); err != nil {
			return nil, err
		}
	}
	if !cfg.Terminal {
		if err := p.pipes(); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// pipes makes a pipe for each wanted stream and opens /dev/null for the others.
func (p *IO) pipes() error {
	for i, s := range []struct {
		stream *stream
		ours   **os.File
	}{{p.in, &p.stdin}, {p.out, &p.stdout}, {p.err, &p.stderr}} {
		if s.stream == nil {
			null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
			if err != nil {
				return fmt.Errorf("open %s: %w", os.DevNull, err)
			}
			p.child[i] = null
			continue
		}
		r, w, err := os.Pipe()
		if err != nil {
			return fmt.Errorf("make a pipe: %w", err)
		}
		if i == 0 {
			p.child[i], *s.ours = r, w
		} else {
			p.child[i], *s.ours = w, r
		}
	}
	return nil
}

// Own gives the pipes to a user and group, who may then open them again, as
// /proc/self/fd/1.
func (p *IO) Own(uid, gid int) error {
	for _, f := range []*os.File{p.stdin, p.stdout, p.stderr} {
		if f == nil {
			continue
		}
		// Both ends are one file.
		if err := f.Chown(uid, gid); err != nil {
			return fmt.Errorf("give a pipe to user %d: %w", uid, err)
		}
	}
	return nil
}

// Runc is p as go-runc wants it.
func (p *IO) Runc() runc.IO { return runcIO{p} }

// Copy starts copying. With a terminal, master is its other end, and p's from
// then on; without one it is nil.
func (p *IO) Copy(ctx context.Context, master *os.File) {
	p.mu.Lock()
	p.pty = master
	p.mu.Unlock()
	if master != nil {
		p.stdout = master
		p.stdin = master
	}
	if p.in != nil {
		go p.copyIn()
	}
	for _, o := range []struct {
		from *os.File
		to   *stream
	}{{p.stdout, p.out}, {p.stderr, p.err}} {
		if o.from == nil {
			continue
		}
		p.output.Go(func() { p.copyOut(ctx, o.from, o.to) })
	}
	go func() {
		p.output.Wait()
		close(p.drained)
	}()
}

// copyIn copies the host's stream to the process until either ends.
func (p *IO) copyIn() {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	_, err := io.CopyBuffer(writerOnly{p.stdin}, readerOnly{p.in}, *buf)
	if err != nil && !processGone(err) {
		// The connection broke: that is no end of input, so keep the process's open.
		<-p.quit
	}
	// With a terminal this hangs it up, as runc's shim does.
	_ = p.stdin.Close()
	_ = p.in.Close()
}

// processGone says whether a write failed because nobody reads it any more.
func processGone(err error) bool {
	return errors.Is(err, unix.EPIPE) || errors.Is(err, unix.EIO) || errors.Is(err, os.ErrClosed)
}

// copyOut copies a process's output to its stream, or to nowhere if there is none.
func (p *IO) copyOut(ctx context.Context, from *os.File, to *stream) {
	defer func() {
		_ = from.Close()
		if to != nil {
			_ = to.Close()
		}
	}()
	w := io.Discard
	if to != nil {
		w = to
	}
	if err := pump(w, from); err != nil {
		select {
		case <-p.quit:
			return
		default:
		}
		log.G(ctx).WithError(err).Warn("a stream of output broke: the process blocks when its pipe is full")
		<-p.quit // Leave the pipe open: closing it would kill the process.
	}
}

// Exited tells that the process has ended. Output goes on as said at IO.
func (p *IO) Exited() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pty != nil {
		_ = p.pty.SetReadDeadline(time.Now().Add(linger))
	}
}

// Drained is closed when all output has been given to the streams. It never is
// if Copy was not called.
func (p *IO) Drained() <-chan struct{} { return p.drained }

// Resize sets the terminal's size in characters.
func (p *IO) Resize(width, height uint16) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pty == nil || p.closed {
		return fmt.Errorf("the process has no terminal: %w", errdefs.ErrFailedPrecondition)
	}
	c, err := p.pty.SyscallConn()
	if err != nil {
		return fmt.Errorf("terminal: %w", err)
	}
	var ierr error
	err = c.Control(func(fd uintptr) {
		ierr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: height, Col: width})
	})
	if err = errors.Join(err, ierr); errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("the terminal was hung up: %w", errdefs.ErrFailedPrecondition)
	}
	return err
}

// Close ends all copying and closes everything. It may be called twice.
func (p *IO) Close() {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return
	}
	p.closed = true
	p.mu.Unlock()
	close(p.quit)
	p.closeChild()
	for _, f := range []*os.File{p.stdin, p.stdout, p.stderr} {
		if f != nil {
			_ = f.Close()
		}
	}
	for _, s := range []*stream{p.in, p.out, p.err} {
		if s != nil {
			_ = s.Close()
		}
	}
}

func (p *IO) closeChild() {
	for i, f := range p.child {
		if f != nil {
			_ = f.Close()
			p.child[i] = nil
		}
	}
}

// runcIO gives crun the process's ends. crun's own messages go to its log.
type runcIO struct{ p *IO }

var _ runc.StartCloser = runcIO{}

func (r runcIO) Close() error          { return nil }
func (r runcIO) Stdin() io.WriteCloser { return nil }
func (r runcIO) Stdout() io.ReadCloser { return nil }
func (r runcIO) Stderr() io.ReadCloser { return nil }

// Set implements runc.IO. go-runc would hold crun's output in a pipe, and wait
// for its end, if it were not told of one.
func (r runcIO) Set(cmd *exec.Cmd) {
	if r.p.terminal {
		null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
		if err != nil {
			return
		}
		r.p.child = [3]*os.File{null, null, null}
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = r.p.child[0], r.p.child[1], r.p.child[2]
}

// CloseAfterStart implements runc.StartCloser.
func (r runcIO) CloseAfterStart() error {
	r.p.closeChild()
	return nil
}
