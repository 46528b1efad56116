// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Command init is PID 1 of the VMs in tests of drivers. It serves the guest
// transport: an echo, a source and a sink of bytes, and commands about the
// machine, one a connection.
package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/guest/api/transport"
)

// The ports, as the tests know them.
const (
	portEcho   = 1
	portSource = 2
	portSink   = 3
	portRun    = 4
)

func main() {
	for _, m := range [][2]string{{"proc", "/proc"}, {"sysfs", "/sys"}, {"tmpfs", "/tmp"}} {
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil {
			fmt.Println("mount", m[1], err)
		}
	}
	mux := transport.NewMux()
	serve(mux, portEcho, func(c net.Conn) { _, _ = io.Copy(c, c) })
	serve(mux, portSource, func(c net.Conn) {
		buf := make([]byte, 64<<10)
		for {
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	})
	serve(mux, portSink, func(c net.Conn) { _, _ = io.Copy(io.Discard, c) })
	serve(mux, portRun, command)
	ctx := context.Background()
	if _, err := os.Stat("/dev/vsock"); err == nil && !hasPorts() {
		go mux.ServeVsock(ctx, transport.VsockPod) //nolint:errcheck
		fmt.Println("test init:", mux.ServeVsock(ctx, transport.VsockVM))
		return
	}
	go mux.ServeDevice(ctx, transport.PortPod) //nolint:errcheck
	fmt.Println("test init:", mux.ServeDevice(ctx, transport.PortVM))
}

// hasPorts tells whether there are virtio-serial ports.
func hasPorts() bool {
	ports, err := filepath.Glob("/sys/class/virtio-ports/*")
	return err == nil && len(ports) > 0
}

func serve(mux *transport.Mux, port uint32, f func(net.Conn)) {
	l, err := mux.Listen(port)
	if err != nil {
		panic(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close() //nolint:errcheck
				f(c)
			}()
		}
	}()
}

// command reads a line and answers "ok" or "error" and what came of it.
func command(c net.Conn) {
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return
	}
	out, err := run(strings.Fields(line))
	if err != nil {
		_, _ = fmt.Fprintf(c, "error %v", err)
		return
	}
	_, _ = fmt.Fprintf(c, "ok %s", out)
}

func run(args []string) (string, error) {
	switch args[0] {
	case "cat":
		b, err := os.ReadFile(args[1])
		return strings.TrimSpace(string(b)), err
	case "write":
		return "", os.WriteFile(args[1], []byte(args[2]), 0)
	case "ls":
		names, err := filepath.Glob(args[1])
		return strings.Join(names, " "), err
	case "sum":
		return sum(args[1])
	case "read":
		return read(args[1], args[2])
	case "hold":
		_, err := os.Open(args[1]) // for good
		return "", err
	case "flush":
		f, err := os.Open(args[1])
		if err != nil {
			return "", err
		}
		defer f.Close() //nolint:errcheck
		return "", unix.IoctlSetInt(int(f.Fd()), unix.BLKFLSBUF, 0)
	case "put":
		f, err := os.OpenFile(args[1], os.O_WRONLY|os.O_SYNC, 0)
		if err != nil {
			return "", err
		}
		defer f.Close() //nolint:errcheck
		_, err = f.WriteString(args[2])
		return "", err
	case "touch":
		return touch(args[1])
	case "random":
		var b [16]byte
		_, err := unix.Getrandom(b[:], 0)
		return fmt.Sprintf("%x", b), err
	case "reseed":
		return "", reseed(args[1])
	case "spam":
		go spam(args[1])
		return "", nil
	case "cpu":
		var t unix.Rusage
		err := unix.Getrusage(unix.RUSAGE_SELF, &t)
		return strconv.FormatInt(t.Utime.Nano()+t.Stime.Nano(), 10), err
	case "poweroff":
		return "", unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	case "reboot":
		return "", unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	case "panic":
		return "", os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
	case "exit":
		os.Exit(3)
	}
	return "", fmt.Errorf("unknown command %q", args[0])
}

// reseed gives the kernel's generator a seed, as the agent does in a clone.
func reseed(seed string) error {
	f, err := os.OpenFile("/dev/random", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck
	hash := sha256.Sum256([]byte(seed))
	info := struct {
		bits, size int32
		seed       [sha256.Size]byte
	}{8 * sha256.Size, sha256.Size, hash}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&info))); errno != 0 { //nolint:gosec // the kernel's structure
		return errno
	}
	return unix.IoctlSetInt(int(f.Fd()), unix.RNDRESEEDCRNG, 0)
}

// sum returns the SHA-256 of a file or device.
func sum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close() //nolint:errcheck
	h := sha256.New()
	n, err := io.Copy(h, f)
	return fmt.Sprintf("%x %d", h.Sum(nil), n), err
}

// read returns the SHA-256 of what can be read of a file or device up to a limit, how
// much that is, and why it is no more.
func read(path, limit string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close() //nolint:errcheck
	most, err := strconv.ParseInt(limit, 10, 64)
	if err != nil {
		return "", err
	}
	h := sha256.New()
	n, err := io.Copy(h, io.LimitReader(f, most))
	return fmt.Sprintf("%x %d %v", h.Sum(nil), n, errors.Unwrap(err)), nil
}

// touch uses so many MiB of memory.
func touch(mib string) (string, error) {
	n, err := strconv.Atoi(mib)
	if err != nil {
		return "", err
	}
	b, err := unix.Mmap(-1, 0, n<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return "", err
	}
	for i := 0; i < len(b); i += 4096 {
		b[i] = 1
	}
	runtime.KeepAlive(b)
	return "", unix.Munmap(b)
}

// spam writes so many lines to the console.
func spam(lines string) {
	n, _ := strconv.Atoi(lines)
	f, err := os.OpenFile("/dev/console", os.O_WRONLY, 0)
	if err != nil {
		return
	}
	defer f.Close() //nolint:errcheck
	for i := range n {
		_, _ = fmt.Fprintf(f, "spam %d %s %s\n", i, strings.Repeat("x", 80), time.Now())
	}
}
