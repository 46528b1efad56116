// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// The orders that a VM's monitor takes, in QEMU's words.
const (
	stop = "stop"
	cont = "cont"
)

// hang stops the processors of the pod's guest, under a VMM that lives on.
func (p *pod) hang() { p.order(stop) }

// cont undoes hang.
func (p *pod) cont() { p.order(cont) }

func (p *pod) order(command string) {
	p.t.Helper()
	// A VM from the pool has a directory of its own.
	give, done := orders(p.t, p.n, filepath.Dir(p.info().VMMLog))
	defer done()
	require.NoError(p.t, give(command))
}

// orders gives orders to the VM of a directory, beside containerd. QEMU's monitor
// serves one connection, which containerd has: the order goes through a copy of
// containerd's descriptor, and nobody waits for the answer's ID. Cloud Hypervisor
// answers whoever asks.
func orders(t *testing.T, n *testnode.Node, vm string) (give func(command string) error, done func()) {
	t.Helper()
	if socket := filepath.Join(vm, "api.sock"); exists(socket) {
		return func(command string) error { return askCloudHypervisor(socket, command) }, func() {}
	}
	conn := monitorOf(t, n, filepath.Join(vm, "qmp.sock"))
	return func(command string) error {
		_, err := conn.WriteString(`{"execute":"` + command + `","id":"e2e"}` + "\n")
		return err
	}, func() { conn.Close() }
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// askCloudHypervisor gives an order over the API and waits for its end.
func askCloudHypervisor(socket, command string) error {
	client := http.Client{
		Timeout: testnode.Scale(10 * time.Second),
		Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		}},
	}
	path := map[string]string{stop: "vm.pause", cont: "vm.resume"}[command]
	req, err := http.NewRequest(http.MethodPut, "http://localhost/api/v1/"+path, nil)
	if err != nil {
		return err
	}
	answer, err := client.Do(req)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusNoContent {
		text, _ := io.ReadAll(io.LimitReader(answer.Body, 1024))
		return fmt.Errorf("%s: %s: %s: %w", path, answer.Status, text, errdefs.ErrFailedPrecondition)
	}
	return nil
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
