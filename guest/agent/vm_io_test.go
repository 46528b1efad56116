// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

func (v *vm) inputOutput(t *testing.T) {
	in, inConn := v.stream()
	errID, errConn := v.stream()
	outConn := v.create("cat", "cat; echo done >&2", func(r *guestv1.CreateRequest) {
		r.Stdio.Stdin, r.Stdio.Stderr = in, errID
	})
	v.start("cat", "")
	data := make([]byte, 8<<20)
	_, _ = rand.New(rand.NewSource(1)).Read(data) //nolint:gosec // any bytes do
	go func() {
		_, _ = inConn.Write(data)
		_ = inConn.(interface{ CloseWrite() error }).CloseWrite()
	}()
	got, err := io.ReadAll(outConn)
	require.NoError(t, err)
	require.Equal(t, sha256.Sum256(data), sha256.Sum256(got))
	stderr, err := io.ReadAll(errConn)
	require.NoError(t, err)
	require.Equal(t, "done\n", string(stderr))
	require.EqualValues(t, 0, v.wait("cat", "").GetExitStatus())
	v.delete("cat", "")
}

func (v *vm) stalled(t *testing.T) {
	before := v.freeMemory()
	conn := v.create("flood", "dd if=/dev/zero bs=65536 count=800 2>/dev/null | cat")
	v.start("flood", "")
	time.Sleep(2 * time.Second)
	require.Less(t, int64(before)-int64(v.freeMemory()), int64(24<<20), "the guest buffers output")
	_, err := v.tasks.State(v.ctx(), &guestv1.StateRequest{Id: "flood"})
	require.NoError(t, err, "others are held up")
	n, err := io.Copy(io.Discard, conn)
	require.NoError(t, err)
	require.EqualValues(t, 800*65536, n)
	v.wait("flood", "")
	v.delete("flood", "")
}

// freeMemory is the VM's available memory in bytes.
func (v *vm) freeMemory() uint64 {
	out, _ := v.run("free", "grep MemAvailable /proc/meminfo")
	var kb uint64
	_, err := fmt.Sscanf(strings.TrimSpace(strings.TrimPrefix(out, "MemAvailable:")), "%d", &kb)
	require.NoError(v.t, err, out)
	return kb << 10
}

func (v *vm) terminal(t *testing.T) {
	in, inConn := v.stream()
	out := v.create("tty", "stty size; read x; echo got-$x; stty size; read y", func(r *guestv1.CreateRequest) {
		r.Spec = testSpec("true", "stty size; read x; echo got-$x; stty size; read y")
		r.Stdio.Terminal, r.Stdio.Stdin = true, in
	})
	_, err := v.tasks.ResizePty(v.ctx(), &guestv1.ResizePtyRequest{Id: "tty", Width: 80, Height: 25})
	require.NoError(t, err)
	v.start("tty", "")
	var text bytes.Buffer
	until := func(want string) {
		buf := make([]byte, 256)
		for !strings.Contains(text.String(), want) {
			n, err := out.Read(buf)
			require.NoError(t, err, text.String())
			text.Write(buf[:n])
		}
	}
	until("25 80")
	_, err = v.tasks.ResizePty(v.ctx(), &guestv1.ResizePtyRequest{Id: "tty", Width: 132, Height: 50})
	require.NoError(t, err)
	_, err = inConn.Write([]byte("hello\n"))
	require.NoError(t, err)
	until("got-hello\r\n50 132\r\n")
	// The end of input hangs the terminal up.
	require.NoError(t, inConn.(interface{ CloseWrite() error }).CloseWrite())
	w := v.wait("tty", "")
	require.NotZero(t, w.GetExitStatus())
	_, _ = io.Copy(io.Discard, out)
	v.delete("tty", "")

	// A child that keeps the terminal open does not keep the stream open.
	v.create("host", "sleep 1000")
	v.start("host", "")
	conn := v.execute("host", "bg", "(trap '' HUP; sleep 500) & echo up", true)
	v.start("host", "bg")
	got, err := io.ReadAll(conn)
	require.NoError(t, err)
	require.Contains(t, string(got), "up")
	require.EqualValues(t, 0, v.wait("host", "bg").GetExitStatus())
	v.delete("host", "bg")
	v.end("host")
}
