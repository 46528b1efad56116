// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"context"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	wirev1 "github.com/cloudhv/containerd-cloudhv/controller/shim/wire/v1"
)

// FuzzTask has containerd send any message to any method of the Task API: it is answered, by
// an error mostly, and nothing is left of it.
func FuzzTask(f *testing.F) {
	bundle := f.TempDir()
	require.NoError(f, os.WriteFile(filepath.Join(bundle, "config.json"), []byte(`{"ociVersion":"1.0.2"}`), 0o600))
	add := func(method string, m proto.Message) {
		b, err := proto.Marshal(m)
		require.NoError(f, err)
		f.Add(method, b)
	}
	add("Create", &wirev1.CreateTaskRequest{Id: "c", Bundle: bundle, Stdout: "file:///dev/null"})
	add("Create", &wirev1.CreateTaskRequest{Id: "../c", Checkpoint: "x"})
	add("Exec", &wirev1.ExecProcessRequest{Id: "there", ExecId: "e", Spec: &anypb.Any{Value: []byte(`{"args":["x"],"cwd":"/"}`)}})
	add("Update", &wirev1.UpdateTaskRequest{Id: "there", Resources: &anypb.Any{Value: []byte(`{"memory":{"limit":-1}}`)}})
	add("ResizePty", &wirev1.ResizePtyRequest{Id: "there", Width: 1 << 31})
	add("Kill", &wirev1.KillRequest{Id: "there", Signal: 1 << 31, All: true})
	for _, method := range []string{"State", "Delete", "Start", "Pids", "Pause", "Resume", "CloseIO", "Stats", "Connect", "Shutdown", "Checkpoint"} {
		add(method, &wirev1.StateRequest{Id: "there"})
	}
	s := lostService(f)
	f.Fuzz(func(t *testing.T, name string, data []byte) {
		s.addContainer()
		verb := s.methods()[name]
		if verb == nil || name == "Wait" { // which waits
			return
		}
		_, err := verb(context.Background(), func(v any) error { return proto.Unmarshal(data, v.(proto.Message)) })
		if err != nil {
			require.NotEqual(t, codes.Unimplemented, status.Code(err), "containerd would take it for an older shim")
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		for id := range maps.Keys(s.tasks) {
			require.Equal(t, "there", id, "something is left")
		}
	})
}

// lostService is a service whose VM is gone.
func lostService(t testing.TB) *service {
	cfg := Config{SandboxID: "pod", Namespace: "k8s.io", SandboxPid: 7, TTRPCAddress: "unix:///does/not/exist"}
	s := newService(context.Background(), cfg, t.TempDir(), goneGuest{})
	t.Cleanup(func() { s.close(0) })
	<-s.guest.gone
	return s
}

// addContainer has the service know one, which its guest does not run.
func (s *service) addContainer() {
	t := &task{svc: s, id: "there"}
	t.init = newProcess(t, "", stdioPaths{}, &processIO{drained: make(chan struct{})})
	t.init.pid, t.init.state = 5, stateRunning
	close(t.init.io.drained)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tasks["there"] = t
}

// goneGuest is a VM that is gone.
type goneGuest struct{}

func (goneGuest) Dial(context.Context, uint32) (net.Conn, error) { return nil, errdefs.ErrUnavailable }
func (goneGuest) Done() <-chan struct{}                          { return nil }
func (goneGuest) Close() error                                   { return nil }

// methods are those of the Task API, by name.
func (s *service) methods() map[string]ttrpc.Method {
	return map[string]ttrpc.Method{
		"State": method(s.State), "Create": method(s.Create), "Start": method(s.Start), "Delete": method(s.Delete),
		"Pids": method(s.Pids), "Pause": method(s.Pause), "Resume": method(s.Resume), "Checkpoint": method(s.Checkpoint),
		"Kill": method(s.Kill), "Exec": method(s.Exec), "ResizePty": method(s.ResizePty), "CloseIO": method(s.CloseIO),
		"Update": method(s.Update), "Wait": method(s.Wait), "Stats": method(s.Stats), "Connect": method(s.Connect),
		"Shutdown": method(s.Shutdown),
	}
}

// FuzzConfig reads any file as a shim's configuration.
func FuzzConfig(f *testing.F) {
	f.Add([]byte(`{"sandbox_id":"pod","namespace":"k8s.io","sandbox_pid":7,"guest_endpoint":"serial+unix:///x","ttrpc_address":"/x","forwards":2}`))
	f.Add([]byte(`{"sandbox_pid":-1}`))
	f.Add([]byte(`{}{}`))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, ConfigFile), data, 0o600))
		cfg, err := LoadConfig(dir)
		if err != nil {
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			return
		}
		require.False(t, slices.Contains([]string{cfg.SandboxID, cfg.Namespace, cfg.GuestEndpoint, cfg.TTRPCAddress}, ""))
	})
}

// FuzzSpecFile reads any file as a container's specification.
func FuzzSpecFile(f *testing.F) {
	f.Add([]byte(`{"ociVersion":"1.0.2","process":{"args":["x"],"cwd":"/"},"linux":{"namespaces":[{"type":"pid"}]}}`))
	f.Add([]byte(`{"unknown":1}`))
	f.Add([]byte(`{} {}`))
	path := filepath.Join(f.TempDir(), "config.json")
	f.Fuzz(func(t *testing.T, data []byte) {
		require.NoError(t, os.WriteFile(path, data, 0o600))
		spec, err := readSpec(path)
		if err != nil {
			require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
			return
		}
		ofEndedPod(spec)
	})
}
