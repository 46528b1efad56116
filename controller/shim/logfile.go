// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"fmt"
	"io"
	"sync"
	"time"
)

// What a shim may log: a burst, and then so much on average. A guest can provoke
// messages without end, and the log is a file of the host.
const (
	logBurst     = 256 << 10
	logPerSecond = 1 << 10
)

// LogWriter lets a bounded number of bytes through to a log and counts the
// messages it drops. It is safe for concurrent use.
type LogWriter struct {
	mu      sync.Mutex
	to      io.Writer
	credit  float64
	at      time.Time
	dropped int
}

// NewLogWriter bounds what goes to a log.
func NewLogWriter(to io.Writer) *LogWriter {
	return &LogWriter{to: to, credit: logBurst, at: time.Now()}
}

// Write takes one message. It never fails: a log that is full ends no shim.
func (w *LogWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	w.credit = min(logBurst, w.credit+now.Sub(w.at).Seconds()*logPerSecond)
	w.at = now
	if float64(len(p)) > w.credit {
		w.dropped++
		return len(p), nil
	}
	w.credit -= float64(len(p))
	if w.dropped > 0 {
		_, _ = fmt.Fprintf(w.to, "%d messages dropped: too many\n", w.dropped)
		w.dropped = 0
	}
	_, _ = w.to.Write(p)
	return len(p), nil
}
