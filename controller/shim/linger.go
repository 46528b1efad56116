// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"context"
	"fmt"
	"os"
	"strconv"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// linger returns when the FIFO has been read to its end, or at cut. A pipe that
// all have closed forgets what is in it, so a process that ends while containerd
// is away would lose its last words; a reader that comes back finds them because
// the shim still holds both ends. inotify tells when somebody has read.
func (o *output) linger(ctx context.Context) {
	if o.unread() == 0 {
		return
	}
	if err := o.watchReader(); err != nil {
		// A reader that is there still gets all; one that is away does not.
		log.G(ctx).WithError(err).Warn("cannot watch for the reader of output")
		return
	}
	events := make([]byte, 4*unix.SizeofInotifyEvent)
	for o.unread() > 0 {
		if _, err := o.watch.Read(events); err != nil {
			break
		}
	}
	_ = o.watch.Close()
}

// watchReader makes o.watch readable each time somebody reads the FIFO. The
// watch is on the inode, wherever its name is by now.
func (o *output) watchReader() error {
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("inotify: %w", err)
	}
	watch := os.NewFile(uintptr(fd), "inotify")
	raw, err := o.r.SyscallConn()
	if err == nil {
		cerr := raw.Control(func(fifo uintptr) {
			_, err = unix.InotifyAddWatch(fd, "/proc/self/fd/"+strconv.Itoa(int(fifo)), unix.IN_ACCESS)
		})
		if err == nil {
			err = cerr
		}
	}
	if err != nil {
		_ = watch.Close()
		return fmt.Errorf("inotify: %w", err)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.watch = watch
	if o.ended {
		_ = watch.Close()
	}
	return nil
}

// unread is how many bytes wait in the FIFO; 0 if it is closed.
func (o *output) unread() int {
	raw, err := o.r.SyscallConn()
	if err != nil {
		return 0
	}
	n := 0
	_ = raw.Control(func(fd uintptr) {
		n, _ = unix.IoctlGetInt(int(fd), unix.TIOCINQ)
	})
	return n
}
