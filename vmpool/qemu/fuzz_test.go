// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package qemu

import (
	"context"
	"encoding/json"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/vmpool/vmm"
)

// FuzzMonitor has QEMU say anything: each call ends, by an answer or an error.
func FuzzMonitor(f *testing.F) {
	f.Add([]byte(`{"QMP":{}}` + "\n" + `{"return":{},"id":"1"}` + "\n" + `{"return":{"n":7},"id":"2"}` + "\n"))
	f.Add([]byte(`{"event":"SHUTDOWN","data":{"reason":7}}` + "\n" + `{"error":{"class":"DeviceNotFound"},"id":"1"}` + "\n"))
	f.Add([]byte(`{"return":1,"id":"1"}` + "\n" + `{"return":1,"id":"1"}` + "\nnonsense\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		require.NoError(t, err)
		host, qemu := conn(t, fds[0]), conn(t, fds[1])
		vm := &machine{}
		m := &monitor{
			conn: host, done: make(chan struct{}), writing: make(chan struct{}, 1),
			calls: map[string]chan message{}, waiters: map[*waiter]struct{}{}, onEvent: vm.onEvent,
		}
		_, stop := m.expect(func(e event) bool { return e.Name == "DEVICE_DELETED" })
		defer stop()
		go func() {
			_, _ = qemu.Write(data)
			_ = qemu.CloseWrite()
		}()
		go m.read()
		for range 2 {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			var n struct{ N int }
			_ = m.call(ctx, "query", nil, &n)
			require.NoError(t, ctx.Err(), "a call hangs")
			cancel()
		}
		m.close()
		_ = qemu.Close()
	})
}

func conn(t *testing.T, fd int) *net.UnixConn {
	t.Helper()
	c, err := net.FileConn(os.NewFile(uintptr(fd), "pair"))
	require.NoError(t, err)
	return c.(*net.UnixConn)
}

// FuzzState takes up a VM by any state: there is none, and so it is refused.
func FuzzState(f *testing.F) {
	f.Add([]byte(`{"size":{"vcpus":1,"memory_bytes":1},"image_disk":true}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, data []byte) {
		vm, err := (&Driver{}).Attach(context.Background(), vmm.State{Driver: Name, ID: "vm1", Dir: t.TempDir(), Pid: 1 << 30, Data: json.RawMessage(data)})
		require.Nil(t, vm)
		require.True(t, errdefs.IsNotFound(err) || errdefs.IsInvalidArgument(err), "%v", err)
	})
}

// TestEventsWithoutEnd has a guest make QEMU tell of events as fast as they are read: after
// the first ones they are read slowly.
func TestEventsWithoutEnd(t *testing.T) {
	t.Parallel()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	host, qemu := conn(t, fds[0]), conn(t, fds[1])
	var seen atomic.Int64
	m := &monitor{
		conn: host, done: make(chan struct{}), writing: make(chan struct{}, 1),
		calls: map[string]chan message{}, waiters: map[*waiter]struct{}{}, onEvent: func(event) { seen.Add(1) },
	}
	event := `{"timestamp":{"seconds":1,"microseconds":2},"event":"ACPI_DEVICE_OST","data":{"info":{"slot":"0","source":0,"status":0}}}` + "\n"
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		many := []byte(strings.Repeat(event, 1000))
		for {
			if _, err := qemu.Write(many); err != nil {
				return
			}
		}
	}()
	go m.read()
	time.Sleep(2 * time.Second)
	require.Less(t, seen.Load(), int64(8<<20/len(event)), "4 MiB and what comes in two seconds")
	m.close()
	_ = qemu.Close()
	<-sent
}
