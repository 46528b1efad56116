// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	shimapi "github.com/cloudhv/containerd-cloudhv/controller/shim"
)

// A host that cannot redirect connections has pods all the same.
func TestAPodWithoutPortForward(t *testing.T) {
	n := newNode(t)
	n.net.listenErr = errInjected
	require.NoError(t, n.create("a"))
	_, err := n.Start(n.ctx(), "a")
	require.NoError(t, err)
	cfg, err := shimapi.LoadConfig(filepath.Join(n.cfg.StateDir, "a"))
	require.NoError(t, err)
	require.Zero(t, cfg.Forwards)
	require.NoError(t, n.Shutdown(n.ctx(), "a"))
}
