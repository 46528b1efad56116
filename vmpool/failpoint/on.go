// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

//go:build failpoints

package failpoint

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Enabled is true in builds whose points can be armed.
const Enabled = true

// look is how often a point that hangs looks whether it may go on.
const look = 2 * time.Millisecond

// At does what the point is armed to.
func At(ctx context.Context, p Point) error {
	dir := os.Getenv(DirVariable)
	if dir == "" {
		return nil
	}
	reached := filepath.Join(dir, p.Reached())
	if err := os.Rename(filepath.Join(dir, p.File()), reached); err != nil {
		return nil // it is not armed, or somebody else has come first
	}
	data, err := os.ReadFile(reached)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // one that hangs, and was released at once
	}
	if err != nil {
		panic(fmt.Sprintf("failpoint %s: %v", p, err))
	}
	switch action := strings.TrimSpace(string(data)); action {
	case Fail:
		return fmt.Errorf("failpoint %s: %w", p, ErrInjected)
	case Refuse:
		return fmt.Errorf("failpoint %s: %w: %w", p, ErrInjected, errdefs.ErrResourceExhausted)
	case Panic:
		panic("failpoint " + string(p))
	case Kill:
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		select {}
	case Hang:
		return hang(ctx, reached, p)
	default:
		panic(fmt.Sprintf("failpoint %s: %q: want %s, %s, %s, %s or %s", p, action, Fail, Refuse, Panic, Kill, Hang))
	}
}

// hang waits until the file has been removed, or until ctx has ended.
func hang(ctx context.Context, reached string, p Point) error {
	tick := time.NewTicker(look)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return fmt.Errorf("failpoint %s: %w", p, context.Cause(ctx))
		case <-tick.C:
		}
		if _, err := os.Lstat(reached); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
	}
}

// Env is what a process that is started needs in its environment, so that its points
// can be armed too.
func Env() []string {
	if dir := os.Getenv(DirVariable); dir != "" {
		return []string{DirVariable + "=" + dir}
	}
	return nil
}
