// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage/pattern"
)

func twoNumbers(args []string) (a int64, b uint64, err error) {
	if len(args) != 2 {
		return 0, 0, errors.New("two numbers are needed")
	}
	if a, err = strconv.ParseInt(args[0], 10, 64); err != nil {
		return 0, 0, err
	}
	b, err = strconv.ParseUint(args[1], 10, 64)
	return a, b, err
}

func gen(args []string) (int, error) {
	n, seed, err := twoNumbers(args)
	if err != nil {
		return 0, err
	}
	h := sha256.New()
	if _, err := io.Copy(io.MultiWriter(os.Stdout, h), pattern.New(seed, n)); err != nil {
		return 0, err
	}
	_, err = fmt.Fprintf(os.Stderr, "%d %x\n", n, h.Sum(nil))
	return 0, err
}

func sink([]string) (int, error) {
	sum, err := digest(os.Stdin)
	if err != nil {
		return 0, err
	}
	fmt.Println(sum)
	return 0, nil
}

// digest returns "COUNT SHA256" of all that r gives.
func digest(r io.Reader) (string, error) {
	h := sha256.New()
	n, err := io.Copy(h, r)
	if err != nil {
		return "", err
	}
	return sumLine(n, h), nil
}

func sumLine(n int64, h hash.Hash) string { return fmt.Sprintf("%d %x", n, h.Sum(nil)) }

// serve answers a line on each connection: "GEN bytes seed" with bytes, "SINK"
// with the digest of what follows, and HTTP's GET with a page.
func serve(args []string) (int, error) {
	if len(args) != 1 {
		return 0, errors.New("a port is needed")
	}
	l, err := net.Listen("tcp", ":"+args[0])
	if err != nil {
		return 0, err
	}
	fmt.Println("listening")
	for {
		c, err := l.Accept()
		if err != nil {
			return 0, err
		}
		go func() {
			defer c.Close()
			if err := answer(c); err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
		}()
	}
}

func answer(c net.Conn) error {
	r := bufio.NewReader(c)
	line, err := r.ReadString('\n')
	if err != nil {
		return err
	}
	words := strings.Fields(line)
	switch {
	case len(words) == 3 && words[0] == "GEN":
		n, seed, err := twoNumbers(words[1:])
		if err != nil {
			return err
		}
		_, err = io.Copy(c, pattern.New(seed, n))
		return err
	case len(words) == 1 && words[0] == "SINK":
		sum, err := digest(r)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(c, sum)
		return err
	case len(words) == 3 && words[0] == "GET":
		host, err := os.Hostname()
		if err != nil {
			return err
		}
		body := "hello from " + host + "\n"
		_, err = fmt.Fprintf(c, "HTTP/1.0 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", len(body), body)
		return err
	}
	return fmt.Errorf("not understood: %q", line)
}

func recv(args []string) (int, error) {
	if len(args) != 3 {
		return 0, errors.New("address, bytes and seed are needed")
	}
	n, seed, err := twoNumbers(args[1:])
	if err != nil {
		return 0, err
	}
	start := time.Now()
	if err := pattern.Recv(args[0], n, seed); err != nil {
		return 0, err
	}
	fmt.Printf("ok %d bytes in %s\n", n, time.Since(start))
	return 0, nil
}

func send(args []string) (int, error) {
	if len(args) != 3 {
		return 0, errors.New("address, bytes and seed are needed")
	}
	n, seed, err := twoNumbers(args[1:])
	if err != nil {
		return 0, err
	}
	start := time.Now()
	if err := pattern.Send(args[0], n, seed); err != nil {
		return 0, err
	}
	fmt.Printf("ok %d bytes in %s\n", n, time.Since(start))
	return 0, nil
}
