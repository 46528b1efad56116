// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	randv2 "math/rand/v2"
	"net"
	"os"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

// identity prints what must differ between two machines, drawn as the first
// thing that this process does, and what the time is. With a port it then serves
// the time.
func identity(args []string) (int, error) {
	var direct [16]byte
	if n, _, errno := syscall.Syscall(sysGetrandom, uintptr(unsafe.Pointer(&direct[0])), uintptr(len(direct)), 0); errno != 0 || int(n) != len(direct) {
		return 1, fmt.Errorf("getrandom: %d, %w", n, errno)
	}
	device := make([]byte, 16)
	f, err := os.Open("/dev/urandom")
	if err != nil {
		return 1, err
	}
	defer f.Close()
	if _, err := f.Read(device); err != nil {
		return 1, err
	}
	library := make([]byte, 16)
	_, _ = rand.Read(library)
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return 1, err
	}
	written, err := fileTime("/tmp/now")
	if err != nil {
		return 1, err
	}
	fmt.Printf("getrandom %x\nurandom %x\ncrypto %x\nmath %016x\nmaphash %016x\nboot_id %s\nmonotonic %d\nboottime %d\nmtime %d\nclock %d\n",
		direct, device, library, randv2.Uint64(), maphash.String(maphash.MakeSeed(), "x"),
		strings.TrimSpace(string(boot)), clock(clockMonotonic), clock(clockBoottime), written, clock(clockRealtime))
	if len(args) == 0 {
		return 0, nil
	}
	return 0, serveTime(args[0])
}

// Clocks of the kernel.
const (
	clockRealtime  = 0
	clockMonotonic = 1
	clockBoottime  = 7
)

// clock is what a clock says, in nanoseconds.
func clock(id uintptr) int64 {
	var ts syscall.Timespec
	if _, _, errno := syscall.Syscall(syscall.SYS_CLOCK_GETTIME, id, uintptr(unsafe.Pointer(&ts)), 0); errno != 0 {
		return 0
	}
	return ts.Nano()
}

// fileTime writes a file and returns the time that it was written at.
func fileTime(path string) (int64, error) {
	if err := os.WriteFile(path, []byte("now"), 0o600); err != nil {
		return 0, err
	}
	st, err := os.Stat(path)
	if err != nil {
		return 0, err
	}
	return st.ModTime().UnixNano(), nil
}

// serveTime answers each byte with the time and the time since boot, in nanoseconds,
// big-endian.
func serveTime(port string) error {
	l, err := net.Listen("tcp", ":"+port)
	if err != nil {
		return err
	}
	fmt.Println("listening")
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close()
			for ask := make([]byte, 1); ; {
				if _, err := io.ReadFull(conn, ask); err != nil {
					return
				}
				answer := binary.BigEndian.AppendUint64(nil, uint64(clock(clockRealtime)))
				answer = binary.BigEndian.AppendUint64(answer, uint64(clock(clockBoottime)))
				if _, err := conn.Write(answer); err != nil {
					return
				}
			}
		}()
	}
}

// setClock sets the time of day, which takes CAP_SYS_TIME, ahead by a duration.
func setClock(args []string) (int, error) {
	if len(args) != 1 {
		return 1, errors.New("a duration is needed")
	}
	by, err := time.ParseDuration(args[0])
	if err != nil {
		return 1, err
	}
	tv := syscall.NsecToTimeval(clock(clockRealtime) + by.Nanoseconds())
	return 0, syscall.Settimeofday(&tv)
}
