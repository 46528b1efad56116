// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"os"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"

	hostv1 "github.com/cloudhv/containerd-cloudhv/controller/hostapi/v1"
	shimapi "github.com/cloudhv/containerd-cloudhv/controller/shim"
)

// TestLost: a sandbox whose shim has given up the guest ends, with the reason, though its VM
// runs on; where the VM ends meanwhile, that is the cause.
func TestLost(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		dies bool
		want string
	}{
		"the VM runs on": {false, `the guest was lost; the shim gave up the guest before: "it babbles"`},
		"the VM ends":    {true, "the VM ended: killed by signal 9"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t)
			p := n.run("a")
			require.NoError(t, os.WriteFile(p.file(shimapi.VMLostFile), []byte("it babbles\n"), 0o600))
			if tc.dies {
				vm := n.driver.only(t)
				time.AfterFunc(lossWait/5, func() { vm.die("killed by signal 9", false) })
			}
			_, err := n.HostService().Lost(n.ctx(), &hostv1.LostRequest{SandboxId: "a"})
			require.NoError(t, err)
			exit, err := n.Wait(n.ctx(), "a")
			require.NoError(t, err)
			require.EqualValues(t, exitKilled, exit.ExitStatus)
			require.Equal(t, tc.want, n.info("a").Cause)
			_, err = n.HostService().Lost(n.ctx(), &hostv1.LostRequest{SandboxId: "a"})
			require.NoError(t, err, "once more")
		})
	}
	n := newNode(t)
	_, err := n.HostService().Lost(n.ctx(), &hostv1.LostRequest{SandboxId: "nobody"})
	require.Error(t, err)
	require.NotErrorIs(t, err, errdefs.ErrInternal)
}
