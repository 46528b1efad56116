// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/api"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

const (
	// copyBytes is a copy's buffer. Each stream has one for as long as it lives,
	// and more than a page of a pipe at a time is no faster here.
	copyBytes = 4096
	// streamLimit is how long the guest may take to accept a stream.
	streamLimit = 30 * time.Second
	// defaultStreamAge is how old a stream may be when its process is made: the guest keeps
	// one without a process for two minutes.
	defaultStreamAge = time.Minute
)

// stdioPaths are a process's as containerd names them: FIFOs, files as
// file:///path for output, or nothing.
type stdioPaths struct {
	stdin, stdout, stderr string
	terminal              bool
}

// processIO carries one process's input and output between containerd's FIFOs
// and streams of the guest. A copy waits for whoever is slower, so that in
// the end a process waits for its reader, and nothing is kept but one buffer.
type processIO struct {
	streams *guestv1.Stdio
	stdin   *input
	outputs []*output
	drained chan struct{} // closed when all output is where it belongs
}

// openIO opens the host's ends. connect opens the guest's, which are to be named in the
// call that makes the process; start begins to copy, and cut ends it all.
func openIO(paths stdioPaths) (_ *processIO, retErr error) {
	p := &processIO{
		streams: &guestv1.Stdio{Terminal: paths.terminal},
		drained: make(chan struct{}),
	}
	defer func() {
		if retErr != nil {
			p.cut()
		}
	}()
	if paths.stdin != "" {
		in, err := openInput(paths.stdin)
		if err != nil {
			return nil, fmt.Errorf("stdin: %w", err)
		}
		p.stdin = in
	}
	for _, o := range []struct {
		name, path string
		id         *string
	}{
		{"stdout", paths.stdout, &p.streams.Stdout},
		{"stderr", paths.stderr, &p.streams.Stderr},
	} {
		// A terminal has one output; containerd may name a FIFO for the other.
		if o.path == "" || o.name == "stderr" && paths.terminal {
			continue
		}
		out, err := openOutput(o.path)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", o.name, err)
		}
		out.name, out.id = o.name, o.id
		p.outputs = append(p.outputs, out)
	}
	return p, nil
}

// connect opens a stream of the guest for each end, side by side, as each takes the
// guest two answers. Streams that were opened before are replaced.
func (p *processIO) connect(ctx context.Context, g Guest) error {
	group, ctx := errgroup.WithContext(ctx)
	open := func(name string, stream *net.Conn, id *string) {
		if *stream != nil {
			_ = (*stream).Close()
		}
		group.Go(func() (err error) {
			if *stream, *id, err = openStream(ctx, g); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			return nil
		})
	}
	if p.stdin != nil {
		open("stdin", &p.stdin.stream, &p.streams.Stdin)
	}
	for _, o := range p.outputs {
		open(o.name, &o.stream, o.id)
	}
	return group.Wait()
}

// start begins to copy. ctx carries the logger only.
func (p *processIO) start(ctx context.Context) {
	if p.stdin != nil {
		go p.stdin.copy(ctx)
	}
	left := int32(len(p.outputs))
	if left == 0 {
		close(p.drained)
		return
	}
	for _, o := range p.outputs {
		go func() {
			o.copy(ctx)
			if atomic.AddInt32(&left, -1) == 0 {
				close(p.drained)
			}
		}()
	}
}

// closeStdin ends the shim's own hold of the FIFO: once containerd's is closed
// too and all is carried, the process reads end of file.
func (p *processIO) closeStdin() {
	if p.stdin != nil {
		p.stdin.closeWriter()
	}
}

// abortStdin ends input at once, as nobody reads it any more.
func (p *processIO) abortStdin() {
	if p.stdin != nil {
		p.stdin.abort()
	}
}

// wait returns when all output was delivered, or after limit.
func (p *processIO) wait(limit time.Duration) {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-p.drained:
	case <-timer.C:
	}
}

// read reports whether nothing of the output waits for a reader of a FIFO.
func (p *processIO) read() bool {
	select {
	case <-p.drained:
		return true
	default:
		return !slices.ContainsFunc(p.outputs, func(o *output) bool { return o.r != nil })
	}
}

// waitRead is wait that ends with ctx too.
func (p *processIO) waitRead(ctx context.Context, limit time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	select {
	case <-p.drained:
	case <-ctx.Done():
	}
}

// cut ends all copies, delivered or not, and closes everything.
func (p *processIO) cut() {
	p.abortStdin()
	for _, o := range p.outputs {
		o.cut()
	}
}

// openStream opens a stream of the guest under an ID of its own.
func openStream(ctx context.Context, g Guest) (_ net.Conn, id string, retErr error) {
	ctx, cancel := context.WithTimeoutCause(ctx, streamLimit, fmt.Errorf("no answer within %v: %w", streamLimit, context.DeadlineExceeded))
	defer cancel()
	conn, err := g.Dial(ctx, api.PortStream)
	if err != nil {
		return nil, "", fmt.Errorf("open guest stream: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer func() {
		if !stop() {
			// Whatever was the matter with a connection that we have closed.
			retErr = fmt.Errorf("open guest stream: %w", context.Cause(ctx))
		}
		if retErr != nil {
			_ = conn.Close()
		}
	}()
	var random [api.StreamIDBytes / 2]byte
	_, _ = rand.Read(random[:])
	id = hex.EncodeToString(random[:])
	if _, err := io.WriteString(conn, id+"\n"); err != nil {
		return nil, "", fmt.Errorf("open guest stream: %w", err)
	}
	var answer [1]byte
	if _, err := io.ReadFull(conn, answer[:]); err != nil {
		return nil, "", fmt.Errorf("open guest stream: %w", err)
	}
	if answer[0] != api.StreamAccepted {
		return nil, "", fmt.Errorf("the guest answered %q to a stream: %w", answer[0], errdefs.ErrInternal)
	}
	return conn, id, nil
}

// input copies a FIFO into a stream. It holds the FIFO's writing end too, so
// that stdin outlives a containerd that goes away.
type input struct {
	stream net.Conn
	r, w   *os.File
}

func openInput(path string) (_ *input, retErr error) {
	if err := checkFIFO(path); err != nil {
		return nil, err
	}
	r, w, err := openFIFO(path)
	if err != nil {
		return nil, err
	}
	return &input{r: r, w: w}, nil
}

func (in *input) closeWriter() { _ = in.w.Close() }

func (in *input) abort() {
	_ = in.w.Close()
	_ = in.r.Close()
	if in.stream != nil {
		_ = in.stream.Close()
	}
}

func (in *input) copy(ctx context.Context) {
	buf := make([]byte, copyBytes)
	_, err := io.CopyBuffer(struct{ io.Writer }{in.stream}, struct{ io.Reader }{in.r}, buf)
	// A writer at the other end is to see that nobody reads.
	_ = in.r.Close()
	_ = in.w.Close()
	if err != nil {
		if !errors.Is(err, os.ErrClosed) && !errors.Is(err, net.ErrClosed) {
			log.G(ctx).WithError(err).Debug("stdin ended early")
		}
		return
	}
	if c, ok := in.stream.(interface{ CloseWrite() error }); ok {
		err = c.CloseWrite()
	} else {
		err = in.stream.Close()
	}
	if err != nil {
		log.G(ctx).WithError(err).Debug("stdin not closed in the guest")
	}
}

// output copies a stream into a FIFO or a file. It holds the FIFO's reading end
// too, so that writing goes on while containerd is away, up to the pipe's size.
type output struct {
	name   string
	stream net.Conn
	id     *string // where the stream's ID belongs
	w      *os.File
	r      *os.File // nil for a file

	mu    sync.Mutex
	watch *os.File // inotify, while the tail waits for its reader
	ended bool     // cut was called
}

// openOutput opens a FIFO, or a file for file:///path.
func openOutput(path string) (*output, error) {
	scheme, rest, ok := strings.Cut(path, "://")
	if !ok {
		scheme, rest = "fifo", path
	}
	switch scheme {
	case "fifo":
		if err := checkFIFO(rest); err != nil {
			return nil, err
		}
		r, w, err := openFIFO(rest)
		if err != nil {
			return nil, err
		}
		return &output{w: w, r: r}, nil
	case "file":
		if err := os.MkdirAll(filepath.Dir(rest), 0o755); err != nil {
			return nil, fmt.Errorf("make log directory: %w", err)
		}
		w, err := os.OpenFile(rest, os.O_APPEND|os.O_CREATE|os.O_WRONLY|unix.O_NOCTTY, 0o644)
		if err != nil {
			return nil, fmt.Errorf("open log file: %w", err)
		}
		return &output{w: w}, nil
	}
	return nil, fmt.Errorf("%s is not served by this shim: want a FIFO or file:///path: %w", quotePath(path), errdefs.ErrInvalidArgument)
}

func checkFIFO(path string) error {
	fi, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if fi.Mode()&os.ModeNamedPipe == 0 {
		return fmt.Errorf("%s is no FIFO: %w", quotePath(path), errdefs.ErrInvalidArgument)
	}
	return nil
}

func quotePath(path string) string { return fmt.Sprintf("%q", path) }

// openFIFO opens both ends without waiting for anybody.
func openFIFO(path string) (r, w *os.File, err error) {
	if r, err = os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0); err != nil {
		return nil, nil, fmt.Errorf("open FIFO: %w", err)
	}
	if w, err = os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK, 0); err != nil {
		_ = r.Close()
		return nil, nil, fmt.Errorf("open FIFO: %w", err)
	}
	return r, w, nil
}

func (o *output) copy(ctx context.Context) {
	buf := make([]byte, copyBytes)
	_, err := io.CopyBuffer(struct{ io.Writer }{o.w}, struct{ io.Reader }{o.stream}, buf)
	if err != nil && !errors.Is(err, os.ErrClosed) && !errors.Is(err, net.ErrClosed) && !errdefs.IsUnavailable(err) {
		log.G(ctx).WithError(err).Warn("output ended early")
	}
	_ = o.stream.Close()
	if o.r != nil {
		o.linger(ctx)
		_ = o.r.Close()
	}
	_ = o.w.Close()
}

func (o *output) cut() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ended = true
	if o.watch != nil {
		_ = o.watch.Close()
	}
	if o.stream != nil {
		_ = o.stream.Close()
	}
	_ = o.w.Close()
	if o.r != nil {
		_ = o.r.Close()
	}
}
