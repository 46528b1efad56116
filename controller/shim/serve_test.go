// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestLoadConfig(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	_, err := LoadConfig(dir)
	assert.ErrorIs(t, err, os.ErrNotExist)
	file := filepath.Join(dir, ConfigFile)
	require.NoError(t, os.WriteFile(file, []byte("{"), 0o600))
	_, err = LoadConfig(dir)
	assert.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	require.NoError(t, os.WriteFile(file, []byte("{}"), 0o600))
	_, err = LoadConfig(dir)
	for _, field := range []string{"sandbox_id", "namespace", "sandbox_pid", "guest_endpoint", "ttrpc_address"} {
		assert.ErrorContains(t, err, field)
	}
}

// A shim that is asked to end does, while a container runs and a call waits.
func TestServeEnds(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "shim")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	p := &pod{t: t, dir: dir, guest: newFakeGuest(t), daemon: newFakeDaemon(t, dir)}
	cfg := Config{SandboxID: "sb", Namespace: "k8s.io", SandboxPid: sandboxPid, TTRPCAddress: p.daemon.path, Debug: true}
	path := filepath.Join(dir, SocketFile)
	l, err := net.Listen("unix", path)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	served := make(chan error)
	go func() { served <- Serve(ctx, cfg, dir, &Sockets{Task: l}, p.guest) }()
	conn, err := net.Dial("unix", path)
	require.NoError(t, err)
	client := ttrpc.NewClient(conn)
	defer client.Close()
	p.client = taskapi.NewTTRPCTaskClient(client)
	s := p.stdio("c", true)
	p.run("c", s, "sleep")
	waited := make(chan error)
	go func() {
		_, err := p.client.Wait(testContext(t), &taskapi.WaitRequest{ID: "c"})
		waited <- err
	}()
	time.Sleep(50 * time.Millisecond)
	cancel()
	assert.NoError(t, <-served)
	assert.Error(t, <-waited, "an exit that nobody knows of is not told")
	assert.Equal(t, []string{"/tasks/create", "/tasks/start"}, p.daemon.wait(2))
	assert.NoFileExists(t, filepath.Join(dir, VMLostFile))
}
