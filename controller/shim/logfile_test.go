// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// The log stays within its bound for ever, and its newest messages are there. A
// panic's file descriptor is still that of the log.
func TestLogIsBound(t *testing.T) {
	t.Parallel()
	file, path, old := logIn(t, t.TempDir())
	_, err := file.WriteString("from before\n")
	require.NoError(t, err)
	w := BoundLog(file, path, old)
	total := func() int {
		n := 0
		for _, name := range []string{path, old} {
			data, err := os.ReadFile(name)
			if !errors.Is(err, fs.ErrNotExist) {
				require.NoError(t, err)
			}
			n += len(data)
		}
		return n
	}
	text := strings.Repeat("x", 1000)
	last := 0
	for most := 0; last < 5000; last++ {
		_, err := fmt.Fprintf(w, "%d %s\n", last, text)
		require.NoError(t, err)
		if last%100 == 0 {
			most = max(most, total())
			require.LessOrEqual(t, most, maxLog+2*len(text))
		}
	}
	assert.Greater(t, total(), maxLog/2)
	_, err = file.WriteString("panic\n")
	require.NoError(t, err)
	data, err := os.ReadFile(path)
	require.NoError(t, err)
	assert.True(t, strings.HasSuffix(string(data), fmt.Sprintf("\n%d %s\npanic\n", last-1, text)))
	kept, err := os.ReadFile(old)
	require.NoError(t, err)
	first, _, _ := strings.Cut(string(data), " ")
	before := strings.Split(strings.TrimSuffix(string(kept), "\n"), "\n")
	n, err := strconv.Atoi(first)
	require.NoError(t, err)
	assert.Equal(t, fmt.Sprint(n-1, " ", text), before[len(before)-1], "nothing is lost between the two")
}

// A log without its directory is cut, and what is no log is left alone.
func TestLogWithoutPlace(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "gone")
	require.NoError(t, os.Mkdir(dir, 0o700))
	file, path, old := logIn(t, dir)
	w := BoundLog(file, path, old)
	require.NoError(t, os.RemoveAll(dir))
	text := strings.Repeat("x", 1000)
	for range 2000 {
		_, err := fmt.Fprintln(w, text)
		require.NoError(t, err)
	}
	info, err := file.Stat()
	require.NoError(t, err)
	assert.LessOrEqual(t, info.Size(), int64(maxLog))

	other, err := os.Open(os.DevNull)
	require.NoError(t, err)
	defer other.Close()
	assert.Same(t, other, BoundLog(other, path, old))
}

// logIn is a log as the controller opens it.
func logIn(t *testing.T, dir string) (file *os.File, path, old string) {
	t.Helper()
	path, old = filepath.Join(dir, LogFile), filepath.Join(dir, OldLogFile)
	file, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	require.NoError(t, err)
	t.Cleanup(func() { _ = file.Close() })
	return file, path, old
}

func TestLogWriter(t *testing.T) {
	t.Parallel()
	var to strings.Builder
	w := NewLogWriter(&to)
	line := []byte(strings.Repeat("x", 1023) + "\n")
	for range 10 * logBurst / len(line) {
		n, err := w.Write(line)
		require.NoError(t, err)
		assert.Equal(t, len(line), n)
	}
	assert.LessOrEqual(t, to.Len(), logBurst+2*len(line))
	w.mu.Lock()
	w.at = w.at.Add(-time.Minute)
	w.mu.Unlock()
	_, _ = w.Write(line)
	assert.Contains(t, to.String(), "messages dropped")
}
