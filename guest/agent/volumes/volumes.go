// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package volumes mounts the file system that the shim serves by 9p2000.L.
package volumes

import (
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Mount mounts what conn serves at target, which it makes, for as long as conn lives.
// conn is closed after an error.
//
// The kernel wants a file descriptor, so it gets one end of a socket pair, between whose
// other end and conn two threads copy. They must not wait for the file system that waits
// for them: they touch no file, and have the kernel write nothing back when they need
// memory (PR_SET_IO_FLUSHER).
//
// The cache mode is mmap, without which no file could be mapped for writing. As the server
// gives no file a version, the kernel uses its page cache for mapped files only, and
// every other read and write is the server's.
func Mount(conn net.Conn, target string, messageBytes uint32) (retErr error) {
	defer func() {
		if retErr != nil {
			_ = conn.Close()
		}
	}()
	if messageBytes == 0 {
		return fmt.Errorf("message_bytes is 0: want the largest message: %w", errdefs.ErrInvalidArgument)
	}
	if err := os.MkdirAll(target, 0o711); err != nil {
		return fmt.Errorf("mount volumes: %w", err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("mount volumes: make a socket pair: %w", err)
	}
	kernel := pair[0]
	// The mount has its own reference.
	defer unix.Close(kernel)
	// By the poller: a thread in a blocking call would keep others from its processor.
	socket := os.NewFile(uintptr(pair[1]), "volumes")
	done := bridge(conn, socket)
	options := fmt.Sprintf("trans=fd,rfdno=%d,wfdno=%d,version=9p2000.L,access=client,cache=mmap,msize=%d", kernel, kernel, messageBytes)
	if err := unix.Mount("volumes", target, "9p", unix.MS_NODEV, options); err != nil {
		_ = socket.Close()
		<-done
		return fmt.Errorf("mount volumes at %s: %w", target, err)
	}
	return nil
}

// bridge copies both ways between conn and socket, and closes them when either ends.
func bridge(conn net.Conn, socket io.ReadWriteCloser) <-chan struct{} {
	done := make(chan struct{})
	var both sync.WaitGroup
	end := func() {
		_ = socket.Close()
		_ = conn.Close()
	}
	both.Go(func() { defer end(); pump(conn, socket) })
	both.Go(func() { defer end(); pump(socket, conn) })
	go func() {
		both.Wait()
		close(done)
	}()
	return done
}

// pumpBytes is the buffer of one way.
const pumpBytes = 64 << 10

// pump copies until either side ends, on a thread of its own that ends with it.
func pump(to io.Writer, from io.Reader) {
	runtime.LockOSThread()
	// Without it a VM short of memory is slower to write back what is mapped.
	_ = unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0)
	buf := make([]byte, pumpBytes)
	_, _ = io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, buf)
}
