// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// hang stops the processors of the pod's guest, under a VMM that lives on. QEMU's
// monitor serves one connection, which containerd has: the command goes through
// a copy of containerd's descriptor, and nobody waits for the answer's ID.
func (p *pod) hang() {
	p.t.Helper()
	conn := p.monitor()
	defer conn.Close()
	_, err := conn.WriteString(`{"execute":"stop","id":"e2e"}` + "\n")
	require.NoError(p.t, err)
}

// monitor is a copy of containerd's connection to the monitor of the pod's VMM.
func (p *pod) monitor() *os.File {
	p.t.Helper()
	// A VM from the pool has a directory of its own.
	return monitorOf(p.t, p.n, filepath.Join(filepath.Dir(p.info().VMMLog), "qmp.sock"))
}

// monitorOf is a copy of containerd's connection to a monitor's socket.
func monitorOf(t *testing.T, n *testnode.Node, socket string) *os.File {
	t.Helper()
	pid := n.Pid()
	pidfd, err := unix.PidfdOpen(pid, 0)
	require.NoError(t, err)
	defer unix.Close(pidfd)
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	require.NoError(t, err)
	for _, e := range fds {
		number, err := strconv.Atoi(e.Name())
		require.NoError(t, err)
		fd, err := unix.PidfdGetfd(pidfd, number, 0)
		if err != nil {
			continue // closed meanwhile
		}
		// What has no peer is none.
		peer, _ := unix.Getpeername(fd)
		if addr, ok := peer.(*unix.SockaddrUnix); ok && addr.Name == socket {
			return os.NewFile(uintptr(fd), socket)
		}
		unix.Close(fd)
	}
	require.Fail(t, "containerd has no connection to the VMM's monitor", socket)
	return nil
}
