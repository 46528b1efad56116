// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

// What a shim may log: a burst, and then so much on average. A guest can provoke
// messages without end, and the log is a file of the host.
const (
	logBurst     = 256 << 10
	logPerSecond = 1 << 10
	// maxLog is what the log takes on disk, with what came before in OldLogFile.
	maxLog = 1 << 20
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

// boundLog is a log that never takes more than maxLog. The oldest output goes
// first.
type boundLog struct {
	file *os.File
	path string
	old  string
	size int64
}

// BoundLog bounds the log at path, which file appends to and of which the older
// part goes to old. What file is instead, such as a terminal, stays as it is. The
// result is not for concurrent use, and file remains the caller's.
func BoundLog(file *os.File, path, old string) io.Writer {
	is, err := file.Stat()
	if err != nil {
		return file
	}
	if want, err := os.Stat(path); err != nil || !is.Mode().IsRegular() || !os.SameFile(is, want) {
		return file
	}
	return &boundLog{file: file, path: path, old: old, size: is.Size()}
}

// Write appends p, or nothing if there is no room to be had.
func (l *boundLog) Write(p []byte) (int, error) {
	if l.size >= maxLog/2 {
		if err := l.turn(); err != nil {
			return 0, err
		}
	}
	n, err := l.file.Write(p)
	l.size += int64(n)
	return n, err
}

// turn begins anew after a copy. A rename would not do: a panic writes to the file
// descriptor that the process was started with.
func (l *boundLog) turn() error {
	keepErr := l.keep()
	if err := l.file.Truncate(0); err != nil {
		return fmt.Errorf("empty the log: %w", errors.Join(err, keepErr))
	}
	l.size = 0
	if keepErr != nil {
		_, _ = fmt.Fprintf(l.file, "older messages are lost: %v\n", keepErr)
	}
	return nil
}

func (l *boundLog) keep() (retErr error) {
	from, err := os.Open(l.path)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := os.OpenFile(l.old, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() { retErr = errors.Join(retErr, to.Close()) }()
	_, err = io.Copy(to, from)
	return err
}
