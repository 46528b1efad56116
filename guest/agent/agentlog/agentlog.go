// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package agentlog sends the agent's log to the VM's console: one short line an
// entry, at a bounded rate, since a console is slow and the host keeps only so
// much of it. All code logs by containerd/log; this package is its back end.
package agentlog

import (
	"bytes"
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
)

// Setup makes out the destination of all log entries.
func Setup(out io.Writer) {
	log.L.Logger.SetFormatter(formatter{})
	log.L.Logger.SetOutput(&limiter{out: out, tokens: burst, now: time.Now})
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

// Write drops p when lines come too fast; that is no error.
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
		fmt.Fprintf(l.out, "agent: warning %d log lines dropped\n", l.dropped)
		l.dropped = 0
	}
	if _, err := l.out.Write(p); err != nil {
		return 0, err
	}
	return len(p), nil
}
