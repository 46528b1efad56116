// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// info is what a verbose status tells of a pod in a virtual machine; see the
// controller's Info.
type info struct {
	State       string `json:"state"`
	Outcome     string `json:"outcome"`
	Cause       string `json:"cause"`
	Hypervisor  string `json:"hypervisor"`
	VMMPid      int    `json:"vmm_pid"`
	ShimPid     int    `json:"shim_pid"`
	VMMLog      string `json:"vmm_log"`
	VCPUs       int    `json:"vcpus"`
	MemoryBytes int64  `json:"memory_bytes"`
	// MaxMemoryBytes is up to what the pod may be resized.
	MaxMemoryBytes int64 `json:"max_memory_bytes"`
	// GuestAgent is the version of what runs in the VM.
	GuestAgent string `json:"guest_agent"`
	Phases     []struct {
		Name     string `json:"name"`
		TookUsec int64  `json:"took_usec"`
	} `json:"phases"`
}

// info asks for the pod's verbose status.
func (p *pod) info() info {
	p.t.Helper()
	st, err := p.n.Runtime().PodSandboxStatus(testContext(p.t), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
	require.NoError(p.t, err)
	var i info
	require.NoError(p.t, json.Unmarshal([]byte(st.GetInfo()["cloudhv"]), &i), "%v", st.GetInfo())
	return i
}

// shimPid is the process ID of the pod's shim.
func (p *pod) shimPid() int {
	p.t.Helper()
	if p.handler == testnode.CloudHV {
		pid := p.info().ShimPid
		require.NotZero(p.t, pid)
		return pid
	}
	p.t.Cleanup(func() { removeDeadSockets(p.t, p.n.Dir("s")) })
	out, err := exec.Command("pgrep", "-f", "containerd-shim-.*"+p.id).Output()
	require.NoError(p.t, err)
	pids := strings.Fields(string(out))
	require.Len(p.t, pids, 1)
	pid, err := strconv.Atoi(pids[0])
	require.NoError(p.t, err)
	return pid
}

// removeDeadSockets removes the sockets that nobody serves: runc's shim leaves its
// own when it is killed, and containerd does not care.
func removeDeadSockets(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		conn, err := net.Dial("unix", path)
		if err == nil {
			require.NoError(t, conn.Close())
		} else if errors.Is(err, syscall.ECONNREFUSED) {
			require.NoError(t, os.Remove(path))
		}
	}
}
