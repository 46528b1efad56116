// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package vmproc

import (
	"io"
	"time"
)

// What this process reads of a VM, of its guest's agent or of its VMM, whose events a guest
// can cause: so much at once, and so many bytes a second after that. A pod's start, and a
// look at its clock each minute, take some tens of kilobytes.
const (
	paceBurst     = 4 << 20
	pacePerSecond = 256 << 10
	// paceRead is what a read costs at least, in bytes, as it wakes a thread.
	paceRead = 256
	// pacePause is for how long nothing is read when that is used up.
	pacePause = 50 * time.Millisecond
)

// paced reads no faster than that. What is not read waits in a socket or a pipe, and then
// in the VMM, whose memory is limited, or in the guest.
type paced struct {
	from io.Reader
	at   time.Time
	left float64
}

// Paced returns a reader of from for what a guest can send or cause without end: containerd
// itself reads it, and a guest is not to take a processor from it. It is for one goroutine
// at a time.
func Paced(from io.Reader) io.Reader {
	return &paced{from: from, at: time.Now(), left: paceBurst}
}

// Read reads what there is, after a pause if too much was read before.
func (p *paced) Read(b []byte) (int, error) {
	for p.left < 0 {
		time.Sleep(pacePause)
		p.earn()
	}
	n, err := p.from.Read(b)
	p.earn()
	p.left -= float64(max(n, paceRead))
	return n, err
}

func (p *paced) earn() {
	now := time.Now()
	p.left = min(paceBurst, p.left+now.Sub(p.at).Seconds()*pacePerSecond)
	p.at = now
}
