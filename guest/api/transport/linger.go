// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package transport

import (
	"slices"
	"time"
)

const (
	// maxLingering is how many connections that the host has closed may wait for
	// the guest's end of them before the oldest is reset.
	maxLingering = 64
	// defaultResetWait is how long a reset may go unanswered while that many wait.
	defaultResetWait = 30 * time.Second
)

// linger waits for the peer's end of a closed connection, and resets it if the
// peer sends more.
func (c *Conn) linger(told chan<- struct{}) {
	defer c.link.remove(c)
	_ = c.stream.Close()
	close(told)
	c.rmu.Lock()
	defer c.rmu.Unlock()
	if c.eof {
		return
	}
	c.link.linger(c)
	_ = c.stream.SetReadDeadline(time.Time{})
	buf := make([]byte, 512)
	for late := 0; ; {
		n, err := c.stream.Read(buf)
		if err != nil {
			return
		}
		// What it held for its reader goes at once.
		c.stream.Shrink()
		if c.told.Load() {
			late += n
		}
		if late > window && !c.link.allowSYN {
			_ = c.link.Close()
			return
		}
		c.link.sendReset(c)
	}
}

// linger takes in a closed connection whose peer has not ended it.
func (l *link) linger(c *Conn) {
	if l.allowSYN {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conns[c.stream.StreamID()] != c {
		return // the peer has reset it
	}
	l.lingering = append(l.lingering, c)
	over := len(l.lingering) - maxLingering
	if over <= 0 {
		return
	}
	for _, old := range l.lingering[:over] {
		if l.claimReset(old) {
			go l.tellReset(old)
		}
	}
	if l.overdue == nil {
		l.overdue = time.AfterFunc(l.resetWait, l.checkOverdue)
	}
}

// checkOverdue ends the session of a guest that answers no resets.
func (l *link) checkOverdue() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.lingering) <= maxLingering {
		l.overdue = nil
		return
	}
	left := l.resetWait - time.Since(l.lingering[0].resetAt)
	if left > 0 {
		l.overdue.Reset(left)
		return
	}
	_ = l.Close()
}

// sendReset tells the peer that what it sends on a closed stream is not wanted.
// The peer's answer frees the stream at this side.
func (l *link) sendReset(c *Conn) {
	l.mu.Lock()
	first := l.claimReset(c)
	l.mu.Unlock()
	if first {
		l.tellReset(c)
	}
}

// claimReset is for who holds l.mu. It reports whether the caller is to send the
// reset, which happens once.
func (l *link) claimReset(c *Conn) bool {
	if !c.reset.CompareAndSwap(false, true) {
		return false
	}
	c.resetAt = time.Now()
	return true
}

func (l *link) tellReset(c *Conn) {
	l.writeReset(c.stream.StreamID())
	c.told.Store(true)
}

// remove forgets a connection that both sides have ended.
func (l *link) remove(c *Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.conns, c.stream.StreamID())
	l.unlinger(c)
}

// unlinger is for who holds l.mu.
func (l *link) unlinger(c *Conn) {
	if i := slices.Index(l.lingering, c); i >= 0 {
		l.lingering = slices.Delete(l.lingering, i, i+1)
	}
}
