// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package transport

import (
	"io"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// A reset ends what the peer waits in, from whichever side it comes, and is no end of
// stream; both sides then forget the connection.
func TestReset(t *testing.T) {
	t.Parallel()
	for _, byGuest := range []bool{false, true} {
		p := newFakePort(t, false)
		m := serveFake(t, p)
		got := make(chan *Conn, 1)
		over := make(chan struct{})
		end := sync.OnceFunc(func() { close(over) })
		defer end()
		handle(t, m, 7, func(c *Conn) {
			got <- c
			<-over
		})
		c := open(t, p)
		resetting, other := dial(t, c, 7), <-got
		if byGuest {
			resetting, other = other, resetting
		}
		read := make(chan error, 1)
		go func() {
			_, err := other.Read(make([]byte, 1))
			read <- err
		}()
		gone := make(chan bool, 1)
		go func() { gone <- other.Gone() }()
		require.NoError(t, resetting.Reset())
		require.ErrorIs(t, <-read, syscall.ECONNRESET)
		require.True(t, <-gone)
		assert.False(t, resetting.Gone(), "it was this side that closed")
		_, err := other.Write([]byte("x"))
		require.Error(t, err)
		require.NoError(t, other.Close())
		require.NoError(t, resetting.Reset(), "again")
		end()
		require.Eventually(t, func() bool { return c.sess.link.open() == 0 }, 10*time.Second, 5*time.Millisecond)
	}
}

// A peer that has ended its direction can still reset the connection, and can be lost.
func TestGoneAfterTheEnd(t *testing.T) {
	t.Parallel()
	p := newFakePort(t, false)
	m := serveFake(t, p)
	got := make(chan *Conn, 2)
	handle(t, m, 7, func(c *Conn) {
		got <- c
		hold(c)
	})
	c := open(t, p)
	var hosts, guests [2]*Conn
	for i := range hosts {
		hosts[i] = dial(t, c, 7)
		guests[i] = <-got
		require.NoError(t, guests[i].CloseWrite())
		_, err := hosts[i].Read(make([]byte, 1))
		require.ErrorIs(t, err, io.EOF)
	}
	gone := make(chan bool)
	go func() { gone <- hosts[0].Gone() }()
	select {
	case <-gone:
		t.Fatal("the guest may still read")
	case <-time.After(50 * time.Millisecond):
	}
	require.NoError(t, guests[0].Reset())
	require.True(t, <-gone)
	require.NoError(t, c.sess.mux.Close())
	require.True(t, hosts[1].Gone(), "the session was lost")
}
