// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

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
)

// maxAnswer bounds an answer of the guest's, in bytes. The longest honest one, the figures
// of a container with many disks, has a tenth of it. Decoded, an answer may take fifty
// times as much memory: an empty message in a list is two bytes on the wire.
const maxAnswer = 64 << 10

// answers lets a guest's answers through: one for each call that was made, of at most
// maxAnswer bytes. The ttrpc client alone would take 4 MiB, and a line of the log for each
// message that it did not ask for.
type answers struct {
	net.Conn
	// asked is how many calls were made; each is counted before it is sent.
	asked *atomic.Int64
	// broken is called, once, before Read fails for what the guest sent: the ttrpc client
	// does not hand that on.
	broken func(error)

	// These are the reader's: how much of a header was read, how much of the answer was
	// not, how many answers have begun, and why reading has ended.
	header     [ttrpcHeader]byte
	have, left int
	begun      int64
	err        error
}

// Read is called by one goroutine at a time.
func (a *answers) Read(p []byte) (int, error) {
	if a.err != nil || len(p) == 0 {
		return 0, a.err
	}
	if a.left > 0 {
		n, err := a.Conn.Read(p[:min(len(p), a.left)])
		a.left -= n
		return n, err
	}
	n, err := a.Conn.Read(p[:min(len(p), ttrpcHeader-a.have)])
	a.have += copy(a.header[a.have:], p[:n])
	if a.have < ttrpcHeader {
		return n, err
	}
	a.have = 0
	if bad := a.check(); bad != nil {
		a.err = bad
		a.broken(bad)
		return 0, bad
	}
	return n, err
}

// check reads the header of an answer.
func (a *answers) check() error {
	length, kind := binary.BigEndian.Uint32(a.header[:4]), a.header[8]
	a.begun++
	switch asked := a.asked.Load(); {
	case kind != ttrpcResponse:
		return fmt.Errorf("the guest sent a message of type %d, want an answer: %w", kind, errdefs.ErrFailedPrecondition)
	case length > maxAnswer:
		return fmt.Errorf("the guest sent an answer of %d bytes, want at most %d: %w", length, maxAnswer, errdefs.ErrFailedPrecondition)
	case a.begun > asked:
		return fmt.Errorf("the guest sent %d answers to %d calls: %w", a.begun, asked, errdefs.ErrFailedPrecondition)
	}
	a.left = int(length)
	return nil
}
