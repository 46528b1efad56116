// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package pause

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// The test's own binary has this package's init, so it can be a pause process.
func TestStart(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	pid, err := Start("/proc/self/exe", nil)
	require.NoError(t, err)
	defer func() {
		require.NoError(t, syscall.Kill(pid, syscall.SIGKILL))
		_, err := syscall.Wait4(pid, nil, 0, nil)
		require.NoError(t, err)
	}()
	proc := fmt.Sprintf("/proc/%d", pid)
	own, err := os.Readlink("/proc/self/ns/pid")
	require.NoError(t, err)
	theirs, err := os.Readlink(filepath.Join(proc, "ns/pid"))
	require.NoError(t, err)
	require.NotEqual(t, own, theirs)

	// Once it ignores signals nothing but SIGKILL ends it.
	require.Eventually(t, func() bool {
		b, err := os.ReadFile(filepath.Join(proc, "status"))
		return err == nil && ignores(b, syscall.SIGTERM)
	}, 10*time.Second, time.Millisecond)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGCHLD} {
		require.NoError(t, syscall.Kill(pid, sig))
	}
	time.Sleep(50 * time.Millisecond)
	require.NoError(t, syscall.Kill(pid, 0))
	name, err := os.ReadFile(filepath.Join(proc, "cmdline"))
	require.NoError(t, err)
	require.Equal(t, "pod-pause\x00", string(name))
}

func ignores(status []byte, sig syscall.Signal) bool {
	_, rest, ok := bytes.Cut(status, []byte("SigIgn:\t"))
	if !ok {
		return false
	}
	var mask uint64
	_, err := fmt.Sscanf(string(rest), "%x", &mask)
	return err == nil && mask&(1<<(sig-1)) != 0
}
