// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	_ "github.com/containerd/containerd/v2/core/runtime" // registers the features' type
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go/features"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	"github.com/cloudhv/containerd-cloudhv/controller/shim"
)

// TestMain is the shim itself when a test asks for it.
func TestMain(m *testing.M) {
	if os.Getenv("SHIM_TEST_MAIN") != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// shimCommand is the shim as another process.
func shimCommand(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), "SHIM_TEST_MAIN=1")
	cmd.Stderr = os.Stderr
	return cmd
}

func TestInfo(t *testing.T) {
	t.Parallel()
	cmd := shimCommand(t, "-info")
	cmd.Stdin = strings.NewReader("some options")
	out, err := cmd.Output()
	require.NoError(t, err)
	var info types.RuntimeInfo
	require.NoError(t, proto.Unmarshal(out, &info))
	assert.Equal(t, "io.containerd.cloudhv.v1", info.Name)
	feat, err := typeurl.UnmarshalAny(info.Features)
	require.NoError(t, err)
	f := feat.(*features.Features)
	// What would make CRI and kubelet promise what the way into a VM does not carry.
	assert.Contains(t, f.MountOptions, "rro")
	assert.Contains(t, f.Linux.Namespaces, "user")
	assert.True(t, *f.Linux.MountExtensions.IDMap.Enabled)
	assert.NotContains(t, f.Linux.Seccomp.Actions, "SCMP_ACT_NOTIFY")
	assert.Contains(t, strings.Split(info.Annotations["containerd.io/runtime-allow-mounts"], ","), "erofs")
}

// TestDelete runs the action as containerd does.
func TestDelete(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name   string
		id     string // in the bundle's file "sandbox"; none without it
		lost   bool
		status uint32
	}{
		{"shim died", "pod1", false, shim.StatusUnknown},
		{"VM died", "pod1", true, shim.StatusVMLost},
		{"other pod's address", "pod2", true, shim.StatusUnknown},
		{"no pod", "", true, shim.StatusUnknown},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			bundle, state := t.TempDir(), filepath.Join(t.TempDir(), "pod1")
			require.NoError(t, os.Mkdir(state, 0o700))
			if tc.lost {
				require.NoError(t, os.WriteFile(filepath.Join(state, shim.VMLostFile), []byte("x"), 0o600))
			}
			if tc.id != "" {
				require.NoError(t, os.WriteFile(filepath.Join(bundle, "sandbox"), []byte(tc.id), 0o600))
			}
			boot, err := json.Marshal(&bootapi.BootstrapResult{Version: 3, Protocol: "ttrpc", Address: "unix://" + filepath.Join(state, shim.SocketFile)})
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(filepath.Join(bundle, "bootstrap.json"), boot, 0o600))
			cmd := shimCommand(t, "-namespace", "k8s.io", "-address", "/run/containerd/containerd.sock", "-publish-binary", "/usr/bin/containerd",
				"-id", "c", "-bundle", bundle, "-debug", "delete")
			cmd.Dir, cmd.Stderr = bundle, nil
			out, err := cmd.Output()
			require.NoError(t, err)
			var resp task.DeleteResponse
			require.NoError(t, proto.Unmarshal(out, &resp))
			assert.Equal(t, tc.status, resp.ExitStatus)
			assert.WithinDuration(t, time.Now(), resp.ExitedAt.AsTime(), time.Minute)
		})
	}
}

func TestOtherModes(t *testing.T) {
	t.Parallel()
	out, err := shimCommand(t, "-v").Output()
	require.NoError(t, err)
	assert.Contains(t, string(out), "Version:")
	for _, args := range [][]string{{}, {"-namespace", "x", "-id", "y", "start"}, {"-nonsense"}, {"-sandbox", "/nonexistent"}} {
		cmd := shimCommand(t, args...)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		assert.Error(t, cmd.Run(), args)
		assert.NotEmpty(t, stderr.String())
	}
}
