// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package agentlog

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/containerd/log"
	"github.com/stretchr/testify/require"
)

func TestFormat(t *testing.T) {
	t.Parallel()
	e := log.L.WithField("b", 2).WithField("a", "x\ny")
	e.Message = "hello"
	e.Level = log.WarnLevel
	got, err := formatter{}.Format(e)
	require.NoError(t, err)
	require.Equal(t, "agent: warning hello a=x y b=2\n", string(got))

	e.Message = strings.Repeat("z", 2*maxLine)
	got, err = formatter{}.Format(e)
	require.NoError(t, err)
	require.Len(t, got, maxLine+1)
	require.True(t, bytes.HasSuffix(got, []byte("...\n")))
}

func TestLimiter(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	now := time.Unix(1000, 0)
	l := &limiter{out: &out, tokens: 2, now: func() time.Time { return now }}
	for range 5 {
		_, err := l.Write([]byte("line\n"))
		require.NoError(t, err)
	}
	require.Equal(t, strings.Repeat("line\n", 2), out.String())
	now = now.Add(time.Second)
	_, err := l.Write([]byte("more\n"))
	require.NoError(t, err)
	require.Equal(t, strings.Repeat("line\n", 2)+"agent: warning 3 log lines dropped\nmore\n", out.String())
}

// slow is a console that is released by the test.
type slow struct {
	bytes.Buffer
	release chan struct{}
}

func (s *slow) Write(p []byte) (int, error) {
	<-s.release
	return s.Buffer.Write(p)
}

// Who logs does not wait for the console, who flushes does, but not for ever.
func TestQueue(t *testing.T) {
	t.Parallel()
	out := &slow{release: make(chan struct{})}
	q := newQueue(out)
	line := []byte("one\n")
	for range 3 {
		_, err := q.Write(line)
		require.NoError(t, err)
		copy(line, "two\n")
	}
	q.flush(10 * time.Millisecond)
	require.Empty(t, out.String())
	close(out.release)
	q.flush(time.Minute)
	require.Equal(t, "one\ntwo\ntwo\n", out.String())
	close(q.lines)
}

// A console that takes nothing stops nobody for long, and what was dropped is told when
// it goes on.
func TestStuckConsole(t *testing.T) {
	t.Parallel()
	out := &slow{release: make(chan struct{})}
	q := newQueue(out)
	l := &limiter{out: q, tokens: 3 * maxQueued, now: func() time.Time { return time.Unix(1000, 0) }}
	began := time.Now()
	for range 2 * maxQueued {
		_, err := l.Write([]byte("line\n"))
		require.NoError(t, err)
	}
	require.Less(t, time.Since(began), 2*patience)
	close(out.release)
	q.flush(time.Minute)
	_, err := l.Write([]byte("more\n"))
	require.NoError(t, err)
	q.flush(time.Minute)
	require.Regexp(t, `^(line\n)+agent: warning \d+ log lines dropped\nmore\n$`, out.String())
	require.Equal(t, 2*maxQueued, strings.Count(out.String(), "line\n")+lost(t, out.String()))
}

// lost is how many lines a log says that were dropped.
func lost(t *testing.T, text string) (n int) {
	t.Helper()
	_, text, _ = strings.Cut(text, "warning ")
	_, err := fmt.Sscanf(text, "%d", &n)
	require.NoError(t, err)
	return n
}
