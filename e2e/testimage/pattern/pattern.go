// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package pattern makes bytes that both ends of a test can make and check:
// lines of text, so that they also pass through logs, which differ all along.
package pattern

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"
)

// dialLimit bounds connecting to a server.
const dialLimit = 30 * time.Second

// reader makes lines of 64 bytes, of which the last may be cut short.
type reader struct {
	state uint64
	left  int64
	line  []byte
}

// New returns n bytes of the given seed's pattern.
func New(seed uint64, n int64) io.Reader {
	return &reader{state: seed*0x9e3779b97f4a7c15 + 1, left: n}
}

// Read implements io.Reader.
func (r *reader) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	if int64(len(p)) > r.left {
		p = p[:r.left]
	}
	n := 0
	for n < len(p) {
		if len(r.line) == 0 {
			r.line = r.next()
		}
		c := copy(p[n:], r.line)
		n, r.line = n+c, r.line[c:]
	}
	r.left -= int64(n)
	return n, nil
}

// next makes a line: 63 hexadecimal digits of a xorshift generator.
func (r *reader) next() []byte {
	const digits = "0123456789abcdef"
	b := make([]byte, 64)
	for i := 0; i < 64; i += 16 {
		r.state ^= r.state << 13
		r.state ^= r.state >> 7
		r.state ^= r.state << 17
		v := r.state
		for j := range 16 {
			b[i+j] = digits[v&15]
			v >>= 4
		}
	}
	b[63] = '\n'
	return b
}

// Sum returns the SHA-256 of New(seed, n), in hexadecimal digits.
func Sum(seed uint64, n int64) string {
	h := sha256.New()
	// Neither reader nor hash can fail.
	_, _ = io.Copy(h, New(seed, n))
	return hex.EncodeToString(h.Sum(nil))
}

// Recv asks the server at addr for n bytes and checks them.
func Recv(addr string, n int64, seed uint64) error {
	c, err := net.DialTimeout("tcp", addr, dialLimit)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := fmt.Fprintf(c, "GEN %d %d\n", n, seed); err != nil {
		return err
	}
	h := sha256.New()
	got, err := io.Copy(h, c)
	if err != nil {
		return fmt.Errorf("after %d bytes: %w", got, err)
	}
	if sum := hex.EncodeToString(h.Sum(nil)); got != n || sum != Sum(seed, n) {
		return fmt.Errorf("got %d bytes (%s), want %d", got, sum, n)
	}
	return nil
}

// Send sends n bytes to the server at addr and checks the digest it answers.
func Send(addr string, n int64, seed uint64) error {
	c, err := net.DialTimeout("tcp", addr, dialLimit)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := io.WriteString(c, "SINK\n"); err != nil {
		return err
	}
	if _, err := io.Copy(c, New(seed, n)); err != nil {
		return err
	}
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return errors.New("not a TCP connection")
	}
	if err := tcp.CloseWrite(); err != nil {
		return err
	}
	answer, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return err
	}
	if want := fmt.Sprintf("%d %s", n, Sum(seed, n)); strings.TrimSpace(answer) != want {
		return fmt.Errorf("the server got %q, want %q", strings.TrimSpace(answer), want)
	}
	return nil
}
