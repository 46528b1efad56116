// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"errors"
	"fmt"
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
	if _, err := io.Copy(os.Stdout, pattern.New(seed, n)); err != nil {
		return 0, err
	}
	_, err = fmt.Fprintln(os.Stderr, pattern.Line(seed, n))
	return 0, err
}

func sink([]string) (int, error) {
	sum, err := pattern.Digest(os.Stdin)
	if err != nil {
		return 0, err
	}
	fmt.Println(sum)
	return 0, nil
}

// serve answers on TCP ports; see pattern.Answer.
func serve(args []string) (int, error) {
	if len(args) == 0 {
		return 0, errors.New("a port or an address is needed")
	}
	host, err := os.Hostname()
	if err != nil {
		return 0, err
	}
	ended := make(chan error)
	for _, addr := range args {
		if !strings.Contains(addr, ":") {
			addr = ":" + addr
		}
		network := "tcp"
		if strings.HasPrefix(addr, "0.0.0.0:") {
			network = "tcp4" // to Go it is both families' otherwise
		}
		l, err := net.Listen(network, addr)
		if err != nil {
			return 0, err
		}
		go func() {
			ended <- pattern.Serve(l, "hello from "+host+"\n", func(err error) { fmt.Fprintln(os.Stderr, err) })
		}()
	}
	fmt.Println("listening")
	return 0, <-ended
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

// until connects to ADDR and exits with CODE when the other side closes.
func until(args []string) (int, error) {
	if len(args) != 2 {
		return 0, errors.New("address and code are needed")
	}
	code, err := strconv.Atoi(args[1])
	if err != nil {
		return 0, err
	}
	c, err := net.Dial("tcp", args[0])
	if err != nil {
		return 0, err
	}
	defer c.Close()
	fmt.Println("connected")
	if _, err := io.Copy(io.Discard, c); err != nil {
		return 0, err
	}
	fmt.Println("released")
	return code, nil
}
