// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// count prints "line N" for FROM ≤ N < TO, INTERVAL apart, to stdout, every tenth
// to stderr, and exits with CODE.
func count(args []string) (int, error) {
	if len(args) != 4 {
		return 0, errors.New("FROM TO INTERVAL CODE are needed")
	}
	from, err1 := strconv.Atoi(args[0])
	to, err2 := strconv.Atoi(args[1])
	interval, err3 := time.ParseDuration(args[2])
	code, err4 := strconv.Atoi(args[3])
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return 0, err
	}
	for i := from; i < to; i++ {
		out := os.Stdout
		if i%10 == 9 {
			out = os.Stderr
		}
		if _, err := fmt.Fprintf(out, "line %d\n", i); err != nil {
			return 0, err
		}
		time.Sleep(interval)
	}
	return code, nil
}

func exit(args []string) (int, error) {
	if len(args) != 1 {
		return 0, errors.New("a code is needed")
	}
	return strconv.Atoi(args[0])
}

// term prints "ready", and then a line for each SIGTERM unless it exits.
func term(args []string) (int, error) {
	if len(args) != 1 {
		return 0, errors.New("ignore or a code is needed")
	}
	sig := make(chan os.Signal, 1)
	signal.Notify(sig, syscall.SIGTERM)
	fmt.Println("ready")
	for range sig {
		fmt.Println("terminated")
		if args[0] != "ignore" {
			return strconv.Atoi(args[0])
		}
	}
	return 0, nil
}

// mem prints "MemTotal MemAvailable CPUs", in bytes.
func mem([]string) (int, error) {
	return 0, writeMem(os.Stdout)
}

// memd answers each connection with what mem prints, so that it can be asked
// without an exec.
func memd(args []string) (int, error) {
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
		if err := errors.Join(writeMem(c), c.Close()); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
}

func writeMem(w io.Writer) error {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return err
	}
	defer f.Close()
	val := map[string]int64{}
	for s := bufio.NewScanner(f); s.Scan(); {
		words := strings.Fields(s.Text())
		if len(words) == 3 {
			kb, err := strconv.ParseInt(words[1], 10, 64)
			if err != nil {
				return err
			}
			val[words[0]] = kb << 10
		}
	}
	_, err = fmt.Fprintln(w, val["MemTotal:"], val["MemAvailable:"], runtime.NumCPU())
	return err
}

// hold touches BYTES of memory and keeps them until stdin ends.
func hold(args []string) (int, error) {
	if len(args) != 1 {
		return 0, errors.New("a number of bytes is needed")
	}
	n, err := strconv.Atoi(args[0])
	if err != nil {
		return 0, err
	}
	b := make([]byte, n)
	for i := 0; i < n; i += 4096 {
		b[i] = 1
	}
	fmt.Println("ok")
	_, err = io.Copy(io.Discard, os.Stdin)
	runtime.KeepAlive(b)
	return 0, err
}
