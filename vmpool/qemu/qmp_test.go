// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// fakeMonitor answers each command by f; an empty answer is none.
func fakeMonitor(t *testing.T, f func(command string) string) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "qmp")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, monitorSocket)
	l, err := net.Listen("unix", path)
	require.NoError(t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close() //nolint:errcheck
		_, _ = io.WriteString(conn, `{"QMP": {"version": {}, "capabilities": []}}`+"\r\n")
		lines := bufio.NewScanner(conn)
		lines.Buffer(nil, maxMessage)
		for lines.Scan() {
			var m struct{ Execute, ID string }
			if json.Unmarshal(lines.Bytes(), &m) != nil {
				return
			}
			switch answer := f(m.Execute); answer {
			case "":
			case "hang up":
				return
			default:
				_, _ = fmt.Fprintf(conn, answer+"\n", m.ID)
			}
		}
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-done
	})
	return path
}

func TestMonitor(t *testing.T) {
	t.Parallel()
	path := fakeMonitor(t, func(command string) string {
		switch command {
		case "qmp_capabilities":
			return `{"return": {}, "id": %q}`
		case "query":
			return `{"event": "SOMETHING", "data": {"device": "d"}}` + "\n" + `{"return": {"n": 7}, "id": %q}`
		case "missing":
			return `{"error": {"class": "DeviceNotFound", "desc": "Device 'x' not found"}, "id": %q}`
		case "end":
			return "hang up"
		}
		return ""
	})
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	seen := make(chan string, 1)
	m, err := dialMonitor(ctx, path, func(e event) { seen <- e.Name })
	require.NoError(t, err)
	defer m.close()

	found, stop := m.expect(func(e event) bool { return e.Name == "SOMETHING" })
	defer stop()
	var result struct{ N int }
	require.NoError(t, m.call(ctx, "query", nil, &result))
	assert.Equal(t, 7, result.N)
	assert.Equal(t, "SOMETHING", <-seen)
	assert.JSONEq(t, `{"device": "d"}`, string((<-found).Data))

	err = m.call(ctx, "missing", nil, nil)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	var answer *qmpError
	require.True(t, errors.As(err, &answer))
	assert.Equal(t, "qemu: missing: Device 'x' not found (DeviceNotFound)", answer.Error())

	short, stopShort := context.WithTimeout(ctx, 20*time.Millisecond)
	defer stopShort()
	require.ErrorIs(t, m.call(short, "silence", nil, nil), context.DeadlineExceeded)
	m.mu.Lock()
	assert.Empty(t, m.calls, "nobody waits for that answer any more")
	m.mu.Unlock()
	require.ErrorIs(t, m.call(ctx, "end", nil, nil), errdefs.ErrUnavailable)
	require.ErrorIs(t, m.call(ctx, "query", nil, nil), errdefs.ErrUnavailable)
}

// TestMonitorGarbage has a monitor that speaks no QMP: the connection ends.
func TestMonitorGarbage(t *testing.T) {
	t.Parallel()
	path := fakeMonitor(t, func(string) string { return "%s is no JSON" })
	_, err := dialMonitor(context.Background(), path, func(event) {})
	require.ErrorIs(t, err, errdefs.ErrUnavailable)
}

// TestMonitorThatDoesNotRead has a QEMU that hangs: nobody waits for it longer
// than he wants, and half a command ends the connection.
func TestMonitorThatDoesNotRead(t *testing.T) {
	t.Parallel()
	hang := make(chan struct{})
	path := fakeMonitor(t, func(command string) string {
		if command == "hang" {
			<-hang
		}
		return `{"return": {}, "id": %q}`
	})
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	m, err := dialMonitor(ctx, path, func(event) {})
	require.NoError(t, err)
	defer m.close()
	defer close(hang)
	short := func() context.Context {
		ctx, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
		t.Cleanup(cancel)
		return ctx
	}
	require.ErrorIs(t, m.call(short(), "hang", nil, nil), context.DeadlineExceeded)

	large := object{"text": strings.Repeat("x", 16<<20)}
	giveUp, cancelLarge := context.WithCancel(ctx)
	defer cancelLarge()
	failed := make(chan error, 1)
	go func() { failed <- m.call(giveUp, "large", large, nil) }()
	require.Eventually(t, func() bool { return len(m.writing) == 1 }, 10*time.Second, time.Millisecond)
	require.ErrorIs(t, m.call(short(), "small", nil, nil), context.DeadlineExceeded)
	select {
	case <-m.done:
		t.Fatal("a command that was not begun has ended the connection")
	default:
	}
	cancelLarge()
	err = <-failed
	require.ErrorIs(t, err, context.Canceled)
	require.NotErrorIs(t, err, errdefs.ErrUnavailable, "QEMU has not gone")
	<-m.done
	require.ErrorIs(t, m.call(ctx, "small", nil, nil), errdefs.ErrUnavailable)
	assert.Empty(t, m.calls)
}

// TestLargeCommand is more than a socket takes at once.
func TestLargeCommand(t *testing.T) {
	t.Parallel()
	path := fakeMonitor(t, func(string) string { return `{"return": {}, "id": %q}` })
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	m, err := dialMonitor(ctx, path, func(event) {})
	require.NoError(t, err)
	defer m.close()
	require.NoError(t, m.call(ctx, "large", object{"text": strings.Repeat("x", 1<<20)}, nil))
}
