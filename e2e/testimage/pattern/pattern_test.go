// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package pattern

import (
	"bytes"
	"io"
	"net"
	"testing"
	"testing/iotest"

	"github.com/stretchr/testify/require"
)

func TestPattern(t *testing.T) {
	const n = 3*blockBytes + 17
	b, err := io.ReadAll(New(1, n))
	require.NoError(t, err)
	require.Len(t, b, n)
	again, err := io.ReadAll(iotest.OneByteReader(New(1, n)))
	require.NoError(t, err)
	require.True(t, bytes.Equal(b, again))
	for i := LineBytes - 1; i < n; i += LineBytes {
		require.Equal(t, byte('\n'), b[i])
	}
	require.NotEqual(t, b[:blockBytes], b[blockBytes:2*blockBytes])
	require.NotEqual(t, Sum(1, n), Sum(2, n))
}

func TestChecksum(t *testing.T) {
	data, err := io.ReadAll(New(3, 1000))
	require.NoError(t, err)
	sum := func(parts ...[]byte) string {
		var c Checksum
		for _, p := range parts {
			k, err := c.Write(p)
			require.NoError(t, err)
			require.Equal(t, len(p), k)
		}
		return c.String()
	}
	whole := sum(data)
	for _, i := range []int{0, 1, 7, 8, 9, 500, 999, 1000} {
		require.Equal(t, whole, sum(data[:i], data[i:]), i)
		require.Equal(t, whole, sum(data[:i], nil, data[i:min(i+3, 1000)], data[min(i+3, 1000):]), i)
	}
	seen := map[string]bool{whole: true}
	for i := range data {
		changed := bytes.Clone(data)
		changed[i] ^= 1
		for _, s := range []string{sum(changed), sum(data[:i])} {
			require.False(t, seen[s], i)
			seen[s] = true
		}
	}
	require.False(t, seen[sum(append(bytes.Clone(data), 0))])
}

func TestServer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = Serve(l, "page\n", func(err error) { t.Error(err) })
	}()
	const n = 1 << 20
	require.NoError(t, Recv(l.Addr().String(), n, 5))
	require.NoError(t, Send(l.Addr().String(), n, 6))
	require.NoError(t, l.Close())
	<-ended
}
