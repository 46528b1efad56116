// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"crypto/rand"
	"fmt"
	"hash/maphash"
	randv2 "math/rand/v2"
	"os"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

// identity prints what must differ between two machines, drawn as the first
// thing that this process does, and what the time is.
func identity([]string) (int, error) {
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
	uptime, err := os.ReadFile("/proc/uptime")
	if err != nil {
		return 1, err
	}
	up, _, _ := strings.Cut(string(uptime), " ")
	fmt.Printf("getrandom %x\nurandom %x\ncrypto %x\nmath %016x\nmaphash %016x\nboot_id %s\nuptime %s\nclock %d\n",
		direct, device, library, randv2.Uint64(), maphash.String(maphash.MakeSeed(), "x"),
		strings.TrimSpace(string(boot)), up, time.Now().UnixNano())
	return 0, nil
}
