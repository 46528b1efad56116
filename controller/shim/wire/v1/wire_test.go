// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package wirev1

import (
	"testing"

	cgroups "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/containerd/api/events"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	eventsservice "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/api/types/runc/options"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// upstream are containerd's messages for ours.
var upstream = map[string]proto.Message{
	"Mount": &types.Mount{}, "CreateTaskRequest": &task.CreateTaskRequest{}, "CreateTaskResponse": &task.CreateTaskResponse{},
	"DeleteRequest": &task.DeleteRequest{}, "DeleteResponse": &task.DeleteResponse{}, "ExecProcessRequest": &task.ExecProcessRequest{},
	"ResizePtyRequest": &task.ResizePtyRequest{}, "StateRequest": &task.StateRequest{}, "StateResponse": &task.StateResponse{},
	"KillRequest": &task.KillRequest{}, "CloseIORequest": &task.CloseIORequest{}, "PidsRequest": &task.PidsRequest{},
	"ProcessInfo": &tasktypes.ProcessInfo{}, "PidsResponse": &task.PidsResponse{}, "CheckpointTaskRequest": &task.CheckpointTaskRequest{},
	"UpdateTaskRequest": &task.UpdateTaskRequest{}, "StartRequest": &task.StartRequest{}, "StartResponse": &task.StartResponse{},
	"WaitRequest": &task.WaitRequest{}, "WaitResponse": &task.WaitResponse{}, "StatsRequest": &task.StatsRequest{},
	"StatsResponse": &task.StatsResponse{}, "ConnectRequest": &task.ConnectRequest{}, "ConnectResponse": &task.ConnectResponse{},
	"ShutdownRequest": &task.ShutdownRequest{}, "PauseRequest": &task.PauseRequest{}, "ResumeRequest": &task.ResumeRequest{},
	"TaskIO": &events.TaskIO{}, "TaskCreate": &events.TaskCreate{}, "TaskStart": &events.TaskStart{}, "TaskDelete": &events.TaskDelete{},
	"TaskExit": &events.TaskExit{}, "TaskOOM": &events.TaskOOM{}, "TaskExecAdded": &events.TaskExecAdded{},
	"TaskExecStarted": &events.TaskExecStarted{}, "TaskPaused": &events.TaskPaused{}, "TaskResumed": &events.TaskResumed{},
	"Envelope": &types.Envelope{}, "ForwardRequest": &eventsservice.ForwardRequest{}, "RuntimeVersion": &types.RuntimeVersion{},
	"RuntimeInfo": &types.RuntimeInfo{}, "ProcessDetails": &options.ProcessDetails{}, "Metrics": &cgroups.Metrics{},
	"PidsStat": &cgroups.PidsStat{}, "CPUStat": &cgroups.CPUStat{}, "MemoryStat": &cgroups.MemoryStat{},
	"MemoryEvents": &cgroups.MemoryEvents{}, "IOStat": &cgroups.IOStat{}, "IOEntry": &cgroups.IOEntry{},
}

// partial are those whose further fields no shim of ours fills or reads.
var partial = map[string]bool{"Metrics": true, "CPUStat": true, "MemoryStat": true, "MemoryEvents": true, "IOStat": true}

// TestSameAsUpstream compares every field's number, name and type.
func TestSameAsUpstream(t *testing.T) {
	t.Parallel()
	ours := File_controller_shim_wire_v1_wire_proto.Messages()
	require.Equal(t, len(upstream), ours.Len())
	for i := range ours.Len() {
		m := ours.Get(i)
		name := string(m.Name())
		theirs := upstream[name]
		require.NotNil(t, theirs, name)
		fields := theirs.ProtoReflect().Descriptor().Fields()
		if !partial[name] {
			assert.Equal(t, fields.Len(), m.Fields().Len(), name)
		}
		for j := range m.Fields().Len() {
			f := m.Fields().Get(j)
			u := fields.ByNumber(f.Number())
			require.NotNil(t, u, "%s.%s", name, f.Name())
			assert.Equal(t, u.Name(), f.Name(), name)
			assert.Equal(t, u.Kind(), f.Kind(), "%s.%s", name, f.Name())
			assert.Equal(t, u.Cardinality(), f.Cardinality(), "%s.%s", name, f.Name())
			if f.Kind() == protoreflect.MessageKind && f.Message().ParentFile() == m.ParentFile() && !f.IsMap() {
				assert.Equal(t, u.Message().FullName(), upstream[string(f.Message().Name())].ProtoReflect().Descriptor().FullName())
			}
		}
	}
	for n, name := range Status_name {
		assert.Equal(t, "STATUS_"+tasktypes.Status_name[n], name)
	}
	assert.Len(t, Status_name, len(tasktypes.Status_name))
}
