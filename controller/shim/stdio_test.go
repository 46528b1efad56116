// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"bytes"
	"io"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	wirev1 "github.com/cloudhv/containerd-cloudhv/controller/shim/wire/v1"
)

func eventFor(testing.TB) proto.Message { return &wirev1.TaskOOM{ContainerId: "x"} }

// All of 200 MB arrives though its reader stalls, and little of it is held. It looks at the
// process's heap, so no other test runs beside it.
func TestStalledReader(t *testing.T) {
	const size = 200 << 20
	p := newPod(t)
	s := p.stdio("c", false)
	p.run("c", s, "bytes", "209715200")
	half := make([]byte, 1<<20)
	_, err := io.ReadFull(s.out, half)
	require.NoError(t, err)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	time.Sleep(2 * time.Second)
	runtime.GC()
	runtime.ReadMemStats(&after)
	assert.Less(t, int64(after.HeapAlloc)-int64(before.HeapAlloc), int64(8<<20))
	_, err = checkPattern(bytes.NewReader(half), 0)
	require.NoError(t, err)
	n, err := checkPattern(s.out, len(half))
	require.NoError(t, err)
	assert.Equal(t, size, n)
	assert.Zero(t, p.wait("c", "").ExitStatus)
	p.delete("c", "")
}

// 50 MB of input arrive whole and end when both have closed: containerd its end
// of the FIFO, and the shim its own at CloseIO.
func TestStdin(t *testing.T) {
	t.Parallel()
	const size = 50 << 20
	p := newPod(t)
	s := p.stdio("c", true)
	p.run("c", s, "cat")
	var in sync.WaitGroup
	in.Go(func() {
		assert.NoError(t, writePattern(s.in, size))
		assert.NoError(t, s.in.Close())
		_, err := p.client.CloseIO(testContext(t), &taskapi.CloseIORequest{ID: "c", Stdin: true})
		assert.NoError(t, err)
	})
	n, err := checkPattern(s.out, 0)
	require.NoError(t, err)
	assert.Equal(t, size, n)
	assert.Zero(t, p.wait("c", "").ExitStatus)
	in.Wait()
}

// The guest does not keep streams for as long as an image may take to be made: they are
// opened anew then.
func TestStreamsGrowOld(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.svc.streamAge = 0
	s := p.stdio("c", true)
	p.run("c", s, "cat")
	p.guest.mu.Lock()
	unclaimed := slices.Collect(maps.Values(p.guest.streams))
	p.guest.mu.Unlock()
	assert.Len(t, unclaimed, 3)
	for _, old := range unclaimed {
		_, err := old.Read(make([]byte, 1))
		assert.ErrorIs(t, err, io.EOF)
	}
	var in sync.WaitGroup
	in.Go(func() {
		assert.NoError(t, writePattern(s.in, 1<<20))
		assert.NoError(t, s.in.Close())
		_, err := p.client.CloseIO(testContext(t), &taskapi.CloseIORequest{ID: "c", Stdin: true})
		assert.NoError(t, err)
	})
	n, err := checkPattern(s.out, 0)
	require.NoError(t, err)
	assert.Equal(t, 1<<20, n)
	in.Wait()
}

// Stdin stays open without containerd.
func TestStdinOutlivesItsWriter(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	s := p.stdio("c", true)
	p.run("c", s, "cat")
	for _, text := range []string{"one", "two"} {
		in := p.fifo(s.paths[0], syscall.O_WRONLY)
		_, err := io.WriteString(in, text)
		require.NoError(t, err)
		require.NoError(t, in.Close())
		got := make([]byte, len(text))
		_, err = io.ReadFull(s.out, got)
		require.NoError(t, err)
		assert.Equal(t, text, string(got))
	}
	assert.Equal(t, "TASK_RUNNING", "TASK_"+p.state("c", "").Status.String())
}

// A writer whose process has ended is not left to wait.
func TestStdinOfTheDead(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	s := p.stdio("c", true)
	p.run("c", s, "cat")
	// The FIFO is open at both ends before the process ends.
	_, err := s.in.Write([]byte("x"))
	require.NoError(t, err)
	_, err = io.ReadFull(s.out, make([]byte, 1))
	require.NoError(t, err)
	_, err = p.client.Kill(testContext(t), &taskapi.KillRequest{ID: "c", Signal: uint32(syscall.SIGKILL)})
	require.NoError(t, err)
	p.wait("c", "")
	buf := make([]byte, 1<<20)
	_, err = s.in.Write(buf)
	assert.ErrorIs(t, err, syscall.EPIPE)
}

// A process that ends while nobody reads keeps its last words.
func TestTailWaitsForItsReader(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.svc.tailLimit = 50 * time.Millisecond
	s := p.unread("c", "40000")
	assert.Zero(t, p.wait("c", "").ExitStatus)
	for range 2 {
		// One reader that dies half-way, and one that reads to the end.
		r := p.fifo(s.paths[1], syscall.O_RDONLY)
		buf := make([]byte, 10000)
		_, err := io.ReadFull(r, buf)
		require.NoError(t, err)
		require.NoError(t, r.Close())
	}
	n, err := checkPattern(p.fifo(s.paths[1], syscall.O_RDONLY), 20000)
	require.NoError(t, err)
	assert.Equal(t, 40000, n)
	p.delete("c", "")
}

// A delete does not wait for readers that never come.
func TestDeleteCutsOutput(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.svc.drainLimit, p.svc.tailLimit = 100*time.Millisecond, 100*time.Millisecond
	s := p.stdio("c", false)
	p.run("c", s, "bytes", "30000")
	p.wait("c", "")
	began := time.Now()
	p.delete("c", "")
	assert.Less(t, time.Since(began), 10*time.Second)
}

func TestLogFile(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	name := filepath.Join(p.dir, "logs", "c.log")
	r := p.createRequest("c", nil, "echo", "hello")
	r.Stdout, r.Stderr = "file://"+name, "file://"+name
	_, err := p.client.Create(testContext(t), r)
	require.NoError(t, err)
	_, err = p.client.Start(testContext(t), &taskapi.StartRequest{ID: "c"})
	require.NoError(t, err)
	p.wait("c", "")
	p.delete("c", "")
	data, err := os.ReadFile(name)
	require.NoError(t, err)
	assert.Contains(t, string(data), "hello")
	assert.Contains(t, string(data), "err:hello")
}
