// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package transport

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestThroughput sends 200 MB through a reader that stalls, each way, with many
// other streams beside it.
func TestThroughput(t *testing.T) {
	const size = 200 << 20
	p := newFakePort(t, false)
	m := serveFake(t, p)
	handle(t, m, 7, echo)
	c := open(t, p)
	conn := dial(t, c, 7)
	other := dial(t, c, 7)

	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	var peak uint64
	sent := sha256.New()
	go func() {
		rng := rand.New(rand.NewSource(1))
		_, _ = io.CopyN(io.MultiWriter(conn, sent), rng, size)
		_ = conn.CloseWrite()
	}()
	got := sha256.New()
	buf := make([]byte, 64<<10)
	began := time.Now()
	for total, stalls := 0, 0; ; {
		n, err := conn.Read(buf)
		got.Write(buf[:n])
		total += n
		if errors.Is(err, io.EOF) {
			require.Equal(t, size, total)
			break
		}
		require.NoError(t, err)
		if total > stalls*size/4 {
			stalls++
			time.Sleep(300 * time.Millisecond)
			// A stalled stream holds up no other.
			_, err := other.Write([]byte("ping"))
			require.NoError(t, err)
			_, err = io.ReadFull(other, buf[:4])
			require.NoError(t, err)
			runtime.ReadMemStats(&after)
			peak = max(peak, after.HeapAlloc)
		}
	}
	assert.Equal(t, sent.Sum(nil), got.Sum(nil))
	assert.Less(t, peak, before.HeapAlloc+(32<<20))
	t.Logf("200 MB echoed in %v, four stalls of 300 ms included; heap at most %d KiB", time.Since(began), peak>>10)
}

func TestManyStreams(t *testing.T) {
	t.Parallel()
	p := newFakePort(t, false)
	m := serveFake(t, p)
	handle(t, m, 7, echo)
	c := open(t, p)
	var wg sync.WaitGroup
	for i := range 500 {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			defer cancel()
			conn, err := c.Dial(ctx, 7)
			if !assert.NoError(t, err) {
				return
			}
			defer conn.Close() //nolint:errcheck
			msg := bytes.Repeat([]byte{byte(i)}, 1000+i)
			_, err = conn.Write(msg)
			assert.NoError(t, err)
			assert.NoError(t, conn.(*Conn).CloseWrite())
			got, err := io.ReadAll(conn)
			assert.NoError(t, err)
			assert.True(t, bytes.Equal(msg, got))
		})
	}
	wg.Wait()
	require.Eventually(t, func() bool { return c.sess.mux.NumStreams() == 0 }, 5*time.Second, 5*time.Millisecond)
}

// TestHostileGuest sends the host frames that a guest has no business to send.
func TestHostileGuest(t *testing.T) {
	t.Parallel()
	tables := map[string][]byte{
		"open a stream":        {0, 1, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0},
		"ping":                 {0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0},
		"go away":              {0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
		"a long frame":         {0, 0, 0, 0, 0, 0, 0, 1, 0x7f, 0xff, 0xff, 0xff, 0},
		"a large window":       {0, 1, 0, 0, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff, 0},
		"another version":      {1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0},
		"another type":         {0, 9, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0},
		"an unknown flag":      {0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0},
		"the wrong trailer":    {0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1},
		"half a frame, no end": {0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 9, 1},
	}
	for name, frame := range tables {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			host, guest := socketpair(t)
			n := newNonce()
			_, err := guest.Write(append(answer(n), frame...))
			require.NoError(t, err)
			if name == "half a frame, no end" {
				require.NoError(t, guest.Close())
			}
			sess, err := handshakeOn(host, n)
			require.NoError(t, err)
			select {
			case <-sess.mux.CloseChan():
			case <-time.After(5 * time.Second):
				t.Error("the session goes on")
			}
			require.NoError(t, sess.mux.Close())
		})
	}
}

func TestListenTwice(t *testing.T) {
	t.Parallel()
	m := NewMux()
	l, err := m.Listen(1)
	require.NoError(t, err)
	_, err = m.Listen(1)
	require.ErrorIs(t, err, errdefs.ErrAlreadyExists)
	require.NoError(t, l.Close())
	require.NoError(t, l.Close())
	_, err = l.Accept()
	require.ErrorIs(t, err, net.ErrClosed)
	_, err = m.Listen(1)
	require.NoError(t, err)
}

func TestServeListener(t *testing.T) {
	t.Parallel()
	path := t.TempDir() + "/s"
	l, err := net.Listen("unix", path)
	require.NoError(t, err)
	m := NewMux()
	echoes, err := m.Listen(7)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := echoes.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close() //nolint:errcheck
				echo(c.(*Conn))
			})
		}
	})
	wg.Go(func() { assert.ErrorIs(t, m.ServeListener(ctx, l), context.Canceled) })
	for range 3 {
		c, err := Open(SerialEndpoint(path))
		require.NoError(t, err)
		dial(t, c, 7)
		require.NoError(t, c.Close())
	}
	cancel()
	require.NoError(t, echoes.Close())
	wg.Wait()
}
