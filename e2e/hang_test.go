// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
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
	socket := filepath.Join(filepath.Dir(p.info().VMMLog), "qmp.sock")
	pid := p.n.Pid()
	pidfd, err := unix.PidfdOpen(pid, 0)
	require.NoError(p.t, err)
	defer unix.Close(pidfd)
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	require.NoError(p.t, err)
	for _, e := range fds {
		number, err := strconv.Atoi(e.Name())
		require.NoError(p.t, err)
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
	require.Fail(p.t, "containerd has no connection to the VMM's monitor", socket)
	return nil
}
