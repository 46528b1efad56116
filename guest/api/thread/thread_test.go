// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package thread

import (
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// A thread is another one than the process's first, and ends with what runs on it.
func TestRun(t *testing.T) {
	t.Parallel()
	failed := errors.New("failed")
	for range 100 {
		var tid int
		require.ErrorIs(t, Run(func() error { tid = unix.Gettid(); return failed }), failed)
		require.NotEqual(t, os.Getpid(), tid)
		require.Eventually(t, func() bool {
			_, err := os.Stat(fmt.Sprint("/proc/self/task/", tid))
			return errors.Is(err, os.ErrNotExist)
		}, 10*time.Second, time.Millisecond)
	}
}
