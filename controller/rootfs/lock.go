// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package rootfs

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// flock locks f, and closes it if it cannot. While another process has the lock
// a goroutine waits in the kernel; if ctx ends first, it closes f when its turn
// comes, which the other's own time limit bounds.
func flock(ctx context.Context, f *os.File) error {
	err := tryFlock(f)
	if err == nil {
		return nil
	}
	if !errors.Is(err, errBusy) {
		_ = f.Close()
		return err
	}
	locked := make(chan error, 1)
	go func() { locked <- unix.Flock(int(f.Fd()), unix.LOCK_EX) }()
	select {
	case err := <-locked:
		if err != nil {
			_ = f.Close()
			return fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		return nil
	case <-ctx.Done():
		go func() {
			<-locked
			_ = f.Close()
		}()
		return fmt.Errorf("wait for %s: %w: %w", f.Name(), context.Cause(ctx), errBusy)
	}
}

// tryFlock locks f or returns errBusy.
func tryFlock(f *os.File) error {
	err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return errBusy
	}
	if err != nil {
		return fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return nil
}
