// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package transport

import (
	"bytes"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestIdleFrames has a guest send frames without use, as fast as they are taken: after some
// thousands they are taken slowly.
func TestIdleFrames(t *testing.T) {
	t.Parallel()
	for name, frame := range map[string][]byte{
		"window updates":      {0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0},
		"empty data":          {0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0},
		"data for no stream":  {0, 0, 0, 0, 0, 0, 0, 99, 0, 0, 0, 1, 'x', 0},
		"resets of no stream": {0, 1, 0, 8, 0, 0, 0, 99, 0, 0, 0, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			host, guest := socketpair(t)
			n := newNonce()
			_, err := guest.Write(answer(n))
			require.NoError(t, err)
			sess, err := handshakeOn(host, n)
			require.NoError(t, err)
			var frames atomic.Int64
			sent := make(chan struct{})
			go func() {
				defer close(sent)
				many := bytes.Repeat(frame, 1000)
				for {
					n, err := guest.Write(many)
					frames.Add(int64(n / len(frame)))
					if err != nil {
						return
					}
				}
			}()
			const wait = time.Second
			began := time.Now()
			time.Sleep(wait)
			seconds := time.Since(began).Seconds()
			// What lies in the sockets is a megabyte at most.
			most := maxIdleFrames + seconds*idlePerSecond + float64(1<<20/len(frame))
			assert.LessOrEqual(t, float64(frames.Load()), most)
			require.NoError(t, sess.mux.Close())
			require.NoError(t, guest.Close())
			<-sent
		})
	}
}

// TestBabblingGuest has a guest answer the handshake by noise without end, which is not
// looked through without a pause.
func TestBabblingGuest(t *testing.T) {
	t.Parallel()
	path := t.TempDir() + "/s"
	l, err := net.Listen("unix", path)
	require.NoError(t, err)
	var accepted, sent atomic.Int64
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		noise := bytes.Repeat([]byte{0x55}, 1<<20)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			accepted.Add(1)
			for err == nil {
				var n int
				n, err = conn.Write(noise)
				sent.Add(int64(n))
			}
			_ = conn.Close()
		}
	}()
	var read atomic.Int64
	c, err := Open(SerialEndpoint(path), WithReader(func(r io.Reader) io.Reader { return &counting{r, &read} }))
	require.NoError(t, err)
	c.start.Do(func() { c.spawn(c.run) })
	require.Eventually(t, func() bool { return sent.Load() > maxStale }, 20*time.Second, time.Millisecond)
	time.Sleep(firstWait / 2)
	assert.LessOrEqual(t, accepted.Load(), int64(2), "it is tried again after a pause")
	assert.LessOrEqual(t, read.Load(), int64(2*maxStale))
	require.NoError(t, c.Close())
	require.NoError(t, l.Close())
	<-ended
	require.False(t, errors.Is(c.err, io.EOF))
}

// counting counts what is read.
type counting struct {
	io.Reader
	n *atomic.Int64
}

func (c *counting) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.n.Add(int64(n))
	return n, err
}
