// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmm

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"sync"
)

// RotatedSuffix is appended to a log's name for what came before.
const RotatedSuffix = ".1"

// Log is a file that never takes more than a limit, counted with what came
// before in the file of the same name plus ".1". The oldest output goes first.
type Log struct {
	path string
	half int64

	mu   sync.Mutex
	file *os.File
	size int64
}

// OpenLog opens or makes the log at path, which is to take at most limit bytes.
func OpenLog(path string, limit int64) (*Log, error) {
	l := &Log{path: path, half: max(limit/2, 1)}
	if err := l.open(os.O_APPEND); err != nil {
		return nil, err
	}
	return l, nil
}

func (l *Log) open(flag int) error {
	f, err := os.OpenFile(l.path, os.O_CREATE|os.O_WRONLY|flag, 0o600)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return errors.Join(err, f.Close())
	}
	l.file, l.size = f, info.Size()
	return nil
}

// Write appends p.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return 0, fs.ErrClosed
	}
	var total int
	for len(p) > 0 {
		if l.size >= l.half {
			if err := l.rotate(); err != nil {
				return total, err
			}
		}
		part := p[:min(int64(len(p)), l.half-l.size)]
		n, err := l.file.Write(part)
		total += n
		l.size += int64(n)
		if err != nil {
			return total, err
		}
		p = p[n:]
	}
	return total, nil
}

func (l *Log) rotate() error {
	err := errors.Join(l.file.Close(), os.Rename(l.path, l.path+RotatedSuffix))
	l.file = nil
	if err != nil {
		return err
	}
	return l.open(os.O_TRUNC)
}

// Close closes the file.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return nil
	}
	err := l.file.Close()
	l.file = nil
	return err
}

// Tail returns the last bytes of the log at path, at most n; none if it cannot
// be read.
func Tail(path string, n int64) []byte {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close() //nolint:errcheck // read only
	info, err := f.Stat()
	if err != nil {
		return nil
	}
	data, err := io.ReadAll(io.NewSectionReader(f, max(0, info.Size()-n), n))
	if err != nil {
		return nil
	}
	return data
}
