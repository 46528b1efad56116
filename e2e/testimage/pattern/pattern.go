// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package pattern makes bytes that both ends of a test can make and check:
// lines of text, so that they also pass through logs, which differ all along.
// It is cheap, as software emulation runs it too.
package pattern

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strings"
	"time"
)

// LineBytes is the length of a line, with its end. The last may be shorter.
const LineBytes = 1024

// blockBytes is the length of what is repeated, but for the number of its first
// digits.
const blockBytes = 64 << 10

// dialLimit bounds connecting to a server.
const dialLimit = 30 * time.Second

// reader repeats a block whose first line begins with its number.
type reader struct {
	block  []byte
	number int
	offset int
	left   int64
}

// New returns n bytes of the given seed's pattern.
func New(seed uint64, n int64) io.Reader {
	const digits = "0123456789abcdef"
	block := make([]byte, blockBytes)
	state := seed*0x9e3779b97f4a7c15 + 1
	for i := range block {
		state ^= state << 13
		state ^= state >> 7
		state ^= state << 17
		block[i] = digits[state>>60]
		if i%LineBytes == LineBytes-1 {
			block[i] = '\n'
		}
	}
	r := &reader{block: block, left: n}
	copy(block, fmt.Sprintf("%08x", 0))
	return r
}

// Read implements io.Reader.
func (r *reader) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	if r.offset == len(r.block) {
		r.number++
		r.offset = 0
		copy(r.block, fmt.Sprintf("%08x", r.number))
	}
	n := copy(p[:min(int64(len(p)), r.left)], r.block[r.offset:])
	r.offset += n
	r.left -= int64(n)
	return n, nil
}

// Sum returns the Checksum of New(seed, n).
func Sum(seed uint64, n int64) string {
	var c Checksum
	// Neither reader nor checksum can fail.
	_, _ = io.Copy(&c, New(seed, n))
	return c.String()
}

// Line is what Digest returns for New(seed, n).
func Line(seed uint64, n int64) string { return fmt.Sprintf("%d %s", n, Sum(seed, n)) }

// Recv asks the server at addr for n bytes and checks them.
func Recv(addr string, n int64, seed uint64) error {
	c, err := net.DialTimeout("tcp", addr, dialLimit)
	if err != nil {
		return err
	}
	defer c.Close()
	return RecvOn(c, n, seed)
}

// RecvOn is Recv on a connection.
func RecvOn(c io.ReadWriter, n int64, seed uint64) error {
	if _, err := fmt.Fprintf(c, "GEN %d %d\n", n, seed); err != nil {
		return err
	}
	got, err := Digest(c)
	if err != nil {
		return err
	}
	if want := Line(seed, n); got != want {
		return fmt.Errorf("got %q, want %q", got, want)
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
	return SendOn(c, n, seed)
}

// SendOn is Send on a connection. The server learns by the end of its direction that
// all was sent or, where it cannot be told so, by the number of bytes.
func SendOn(c io.ReadWriter, n int64, seed uint64) error {
	end, half := c.(interface{ CloseWrite() error })
	ask := "SINK\n"
	if !half {
		ask = fmt.Sprintf("TAKE %d\n", n)
	}
	if _, err := io.WriteString(c, ask); err != nil {
		return err
	}
	if _, err := io.Copy(c, New(seed, n)); err != nil {
		return err
	}
	if half {
		if err := end.CloseWrite(); err != nil {
			return err
		}
	}
	answer, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return err
	}
	if want := Line(seed, n); strings.TrimSpace(answer) != want {
		return fmt.Errorf("the server got %q, want %q", strings.TrimSpace(answer), want)
	}
	return nil
}

// Digest returns the count and the Checksum of all that r gives.
func Digest(r io.Reader) (string, error) {
	var c Checksum
	n, err := io.Copy(&c, r)
	if err != nil {
		return "", fmt.Errorf("after %d bytes: %w", n, err)
	}
	return fmt.Sprintf("%d %s", n, &c), nil
}

// Answer reads a line from a connection and answers it: "GEN bytes seed" with
// bytes, "SINK" with the digest of what follows, "TAKE bytes" with that of so much of
// it, HTTP's GET with page.
func Answer(c net.Conn, page string) error {
	r := bufio.NewReader(c)
	line, err := r.ReadString('\n')
	if err != nil {
		return err
	}
	var n int64
	var seed uint64
	switch {
	case strings.HasPrefix(line, "GET "):
		_, err = fmt.Fprintf(c, "HTTP/1.0 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", len(page), page)
		return err
	case line == "SINK\n":
		return answerDigest(c, r)
	}
	if _, err := fmt.Sscanf(line, "TAKE %d\n", &n); err == nil {
		return answerDigest(c, io.LimitReader(r, n))
	}
	if _, err := fmt.Sscanf(line, "GEN %d %d\n", &n, &seed); err != nil {
		return fmt.Errorf("not understood: %q: %w", line, err)
	}
	_, err = io.Copy(c, New(seed, n))
	return err
}

func answerDigest(w io.Writer, r io.Reader) error {
	sum, err := Digest(r)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(w, sum)
	return err
}

// Serve answers every connection until the listener is closed. What goes wrong
// with one is given to report.
func Serve(l net.Listener, page string, report func(error)) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			if err := Answer(c, page); err != nil {
				report(err)
			}
		}()
	}
}
