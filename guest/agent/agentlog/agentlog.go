// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package agentlog sends the agent's log to the VM's console: one short line an
// entry, at a bounded rate, since a console is slow and the host keeps only so
// much of it. All code logs by containerd/log; this package is its back end.
package agentlog

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/containerd/log"
)

const (
	// maxLine bounds a line, in bytes, without its newline.
	maxLine = 512
	// burst lines may come at once, then perSecond of them.
	burst     = 200
	perSecond = 20
	// maxQueued lines wait for the console, and who logs more waits for it, but no
	// longer than patience: a console that is stuck must not stop the agent.
	maxQueued = 64
	patience  = time.Second
)

// errStuck tells that a line was dropped.
var errStuck = errors.New("the console is stuck")

// Setup makes out the destination of all log entries. They are written by another
// goroutine, as an emulated serial port takes some 0.1 ms for each character. flush
// waits until those so far are written, or for no longer than limit.
func Setup(out io.Writer) (flush func(limit time.Duration)) {
	q := newQueue(out)
	log.L.Logger.SetFormatter(formatter{})
	log.L.Logger.SetOutput(&limiter{out: q, tokens: burst, now: time.Now})
	return q.flush
}

// queue writes lines in their order, and makes who comes too fast wait.
type queue struct {
	lines chan queued
	// stuck is true from when a line was waited for in vain until there is room again.
	// It is Write's, which is not called twice at once.
	stuck bool
}

// queued is a line or, without one, tells who waits that those before are written.
type queued struct {
	line    []byte
	written chan struct{}
}

func newQueue(out io.Writer) *queue {
	q := &queue{lines: make(chan queued, maxQueued)}
	go func() {
		for next := range q.lines {
			if next.written != nil {
				close(next.written)
				continue
			}
			_, _ = out.Write(next.line) // there is nobody to tell
		}
	}()
	return q
}

// Write queues a line, which stays the caller's. It fails with errStuck if there is no
// room for it.
func (q *queue) Write(p []byte) (int, error) {
	wait := patience
	if q.stuck {
		wait = 0
	}
	late := time.NewTimer(wait)
	defer late.Stop()
	next := queued{line: bytes.Clone(p)}
	select {
	case q.lines <- next:
	default:
		select {
		case q.lines <- next:
		case <-late.C:
			q.stuck = true
			return 0, errStuck
		}
	}
	q.stuck = false
	return len(p), nil
}

func (q *queue) flush(limit time.Duration) {
	late := time.After(limit)
	written := make(chan struct{})
	select {
	case q.lines <- queued{written: written}:
	case <-late:
		return
	}
	select {
	case <-written:
	case <-late:
	}
}

// formatter writes "agent: level message key=value" in the order of keys. There
// is no time in it: the host's console log has the kernel's beside it, and the
// VM's clock is wrong until Configure.
type formatter struct{}

// Format implements logrus's Formatter.
func (formatter) Format(e *log.Entry) ([]byte, error) {
	var b bytes.Buffer
	b.WriteString("agent: ")
	b.WriteString(e.Level.String())
	b.WriteByte(' ')
	b.WriteString(e.Message)
	keys := make([]string, 0, len(e.Data))
	for k := range e.Data {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		fmt.Fprintf(&b, " %s=%v", k, e.Data[k])
	}
	line := printable(b.Bytes())
	return append(line, '\n'), nil
}

// printable cuts a line to maxLine and replaces what would break it up or steer
// a terminal: names in it come from images and requests.
func printable(line []byte) []byte {
	if len(line) > maxLine {
		line = append(line[:maxLine-3], "..."...)
	}
	for i, c := range line {
		if c < ' ' || c == 0x7f {
			line[i] = ' '
		}
	}
	return line
}

// limiter passes lines on while it has tokens and counts those it drops.
type limiter struct {
	mu      sync.Mutex
	out     io.Writer
	now     func() time.Time
	last    time.Time
	tokens  float64
	dropped int
}

// Write drops p when lines come too fast, or cannot be written; that is no error.
func (l *limiter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	// The clock is set once, by Configure: a step back adds nothing.
	if d := now.Sub(l.last); d > 0 && !l.last.IsZero() {
		l.tokens = min(burst, l.tokens+d.Seconds()*perSecond)
	}
	l.last = now
	if l.tokens < 1 {
		l.dropped++
		return len(p), nil
	}
	l.tokens--
	if l.dropped > 0 {
		if _, err := fmt.Fprintf(l.out, "agent: warning %d log lines dropped\n", l.dropped); err == nil {
			l.dropped = 0
		}
	}
	if _, err := l.out.Write(p); err != nil {
		l.dropped++ // there is nobody to tell now
	}
	return len(p), nil
}
