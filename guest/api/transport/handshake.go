// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package transport

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
)

const (
	magic     = "\x89chv\r\n\x1a\x01"
	nonceSize = 16
	// padSize is longer than the rest of any frame and one header together.
	padSize = maxFrame + headerSize
	// maxStale bounds what a host skips in one attempt to find its answer.
	maxStale = 64 << 20
)

type nonce [nonceSize]byte

// errNoAnswer means that the guest sent much, but not the answer.
var errNoAnswer = errors.New("no answer to the handshake among the guest's output")

func newNonce() nonce {
	var n nonce
	rand.Read(n[:]) //nolint:errcheck // never fails
	return n
}

// preamble is what the host begins with.
func preamble(n nonce) []byte {
	b := make([]byte, 0, padSize+len(magic)+nonceSize)
	b = append(b, bytes.Repeat([]byte{0xff}, padSize)...)
	b = append(b, magic...)
	return append(b, n[:]...)
}

// answer is what the guest replies.
func answer(n nonce) []byte {
	return append([]byte(magic), n[:]...)
}

// scanPreamble reads up to the end of the next magic and nonce, and returns the
// nonce. It reads nothing beyond them.
func scanPreamble(r *bufio.Reader) (nonce, error) {
	var n nonce
	if err := skipPast(r, []byte(magic), 0); err != nil {
		return n, err
	}
	_, err := io.ReadFull(r, n[:])
	return n, err
}

// scanAnswer reads up to the end of the answer to n, at most maxStale bytes.
func scanAnswer(r *bufio.Reader, n nonce) error {
	if err := skipPast(r, answer(n), maxStale); err != nil {
		return fmt.Errorf("wait for the guest's answer: %w", err)
	}
	return nil
}

// skipPast reads up to the end of the next pattern, and gives up after limit
// bytes without it; 0 is no limit. The reader's buffer must hold the pattern.
func skipPast(r *bufio.Reader, pattern []byte, limit int64) error {
	var skipped int64
	for {
		// One byte more than is buffered is never asked for, so that what lies in
		// the buffer is looked at first.
		if _, err := r.Peek(len(pattern)); err != nil {
			return err
		}
		buf, err := r.Peek(r.Buffered())
		if err != nil {
			return err
		}
		i := bytes.Index(buf, pattern)
		drop := i + len(pattern)
		if i < 0 {
			// A pattern may begin in the buffer's last bytes.
			drop = len(buf) - len(pattern) + 1
		}
		if _, err := r.Discard(drop); err != nil {
			return err
		}
		skipped += int64(drop)
		if i >= 0 {
			return nil
		}
		if limit > 0 && skipped > limit {
			return errNoAnswer
		}
	}
}
