// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package transport

import (
	"bytes"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// FuzzSession has a guest send any bytes after the handshake, with a stream open: reads of
// it end when the guest does, and nothing goes on after that.
func FuzzSession(f *testing.F) {
	f.Add([]byte{0, 1, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0})
	f.Add([]byte{0, 1, 0, 8, 0, 0, 0, 1, 0, 0, 0, 0, 0})
	f.Add([]byte{0, 0, 0, 4, 0, 0, 0, 1, 0, 0, 0, 2, 'h', 'i', 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 'x', 0})
	f.Add([]byte{0, 1, 0, 2, 0, 0, 0, 1, 0, 8, 0, 0, 0, 0, 1, 0, 2, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff, 0})
	f.Fuzz(func(t *testing.T, in []byte) {
		host, guest := net.Pipe()
		n := newNonce()
		go io.Copy(io.Discard, guest) //nolint:errcheck
		go func() {
			_, _ = guest.Write(answer(n))
			time.Sleep(time.Millisecond) // the stream is open
			_, _ = guest.Write(in)
			_ = guest.Close()
		}()
		sess, err := handshakeOn(host, n)
		require.NoError(t, err)
		stream, err := sess.mux.OpenStream()
		if err == nil {
			c := newConn(stream, sess.link, 7)
			got, err := io.ReadAll(c)
			require.LessOrEqual(t, len(got), len(in))
			if err == nil {
				require.True(t, c.fin.Load(), "an end that the guest did not send")
			}
			_ = c.Close()
		}
		require.NoError(t, sess.mux.Close())
		require.LessOrEqual(t, sess.link.open(), 1)
	})
}

// FuzzVsockAnswer has a VMM answer a connect by anything: what follows a good answer is left
// to be read, to the byte.
func FuzzVsockAnswer(f *testing.F) {
	f.Add([]byte("OK 1073741824\nrest"))
	f.Add([]byte("OK "))
	f.Add([]byte(strings.Repeat("O", 100)))
	f.Fuzz(func(t *testing.T, in []byte) {
		conn := &said{r: bytes.NewReader(in)}
		err := connectVsock(conn, 1024)
		line, rest, ok := bytes.Cut(in, []byte("\n"))
		good := ok && len(line) < maxVsockAnswer && bytes.HasPrefix(line, []byte("OK "))
		require.Equal(t, good, err == nil, "%v", err)
		if good {
			left, _ := io.ReadAll(conn.r)
			require.Equal(t, string(rest), string(left))
		}
	})
}

// said is a connection whose peer has said all there is to say.
type said struct {
	net.Conn
	r io.Reader
}

func (s *said) Read(p []byte) (int, error) { return s.r.Read(p) }
func (*said) Write(p []byte) (int, error)  { return len(p), nil }

// FuzzEndpoint reads any text as an endpoint. What is one is made the same again.
func FuzzEndpoint(f *testing.F) {
	for _, s := range []string{"serial+unix:///run/x", "vsock+unix:///run/x:1025", "vsock+unix://x:0", "vsock+unix://:", "://", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		path, port, err := parseEndpoint(text)
		if err != nil {
			return
		}
		made := SerialEndpoint(path)
		if port != 0 {
			made = VsockEndpoint(path, port)
		}
		again, samePort, err := parseEndpoint(made)
		if err != nil || again != path || samePort != port {
			t.Fatal(errors.Join(err, errors.New(made)))
		}
	})
}
