// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"encoding/binary"
	"fmt"
	"net"
	"sync/atomic"

	"github.com/containerd/errdefs"
)

// The header of a ttrpc message: length without the header, stream, type, flags.
const (
	ttrpcHeader   = 10
	ttrpcResponse = 2
	// firstStream is the stream of a client's first call.
	firstStream = 1
)

// errAnswer tells of a guest that sent something else than one answer.
var errAnswer = fmt.Errorf("the guest's agent broke the protocol: %w", errdefs.ErrFailedPrecondition)

// answerConn lets one answer of the guest through: a response, to the one call
// that is made on the connection, of at most maxGuestAnswer bytes. The ttrpc
// client alone would take 4 MiB, and write a line into containerd's log for each
// message that it did not ask for.
type answerConn struct {
	net.Conn
	header [ttrpcHeader]byte
	// have is how much of the header was read, left how much of the answer was not.
	have, left int
	// broken is set before Read fails for what the guest sent: the ttrpc client
	// does not hand that on.
	broken atomic.Pointer[error]
}

// Read is called by one goroutine at a time.
func (c *answerConn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if c.have < ttrpcHeader {
		n, err := c.Conn.Read(p[:min(len(p), ttrpcHeader-c.have)])
		c.have += copy(c.header[c.have:], p[:n])
		if c.have == ttrpcHeader {
			if err := c.check(); err != nil {
				c.broken.Store(&err)
				return 0, err
			}
		}
		return n, err
	}
	// After the answer this waits for the connection's end.
	n, err := c.Conn.Read(p[:min(len(p), max(c.left, 1))])
	if n > c.left {
		return 0, errAnswer
	}
	c.left -= n
	return n, err
}

// check reads the header.
func (c *answerConn) check() error {
	length := binary.BigEndian.Uint32(c.header[:4])
	stream := binary.BigEndian.Uint32(c.header[4:8])
	kind := c.header[8]
	if stream != firstStream || kind != ttrpcResponse {
		return fmt.Errorf("message of type %d on stream %d: %w", kind, stream, errAnswer)
	}
	if length > maxGuestAnswer {
		return fmt.Errorf("an answer of %d bytes, and %d are allowed: %w", length, maxGuestAnswer, errAnswer)
	}
	c.left = int(length)
	return nil
}
