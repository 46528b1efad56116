// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package main

import (
	"bytes"
	"io"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

func (v *vm) kill(t *testing.T) {
	conn := v.create("k", "trap 'echo term; exit 3' TERM; echo up; while :; do sleep 0.1; done")
	require.Equal(t, codes.NotFound, status.Code(v.signal("none", "", 15, false)))
	require.Equal(t, codes.NotFound, status.Code(v.signal("k", "none", 15, false)))
	v.start("k", "")
	up(t, conn)
	require.Equal(t, codes.InvalidArgument, status.Code(v.signal("k", "", 999, false)))
	require.NoError(t, v.signal("k", "", 15, false))
	require.EqualValues(t, 3, v.wait("k", "").GetExitStatus())
	require.Equal(t, codes.NotFound, status.Code(v.signal("k", "", 15, false)))
	v.delete("k", "")

	conn = v.create("all", "sleep 1000 & sleep 1000 & echo up; wait")
	v.start("all", "")
	up(t, conn)
	require.NoError(t, v.signal("all", "", 9, true))
	require.EqualValues(t, 137, v.wait("all", "").GetExitStatus())
	v.delete("all", "")
}

func (v *vm) podPids(t *testing.T) {
	one := v.create("one", "(sleep 1000 &) ; echo up; exec sleep 1000", inPodPids)
	v.start("one", "")
	up(t, one)
	out, _ := v.run("two", "ps", inPodPids)
	require.Contains(t, out, "pod-pause")
	require.Contains(t, out, "sleep 1000")
	st, err := v.tasks.State(v.ctx(), &guestv1.StateRequest{Id: "one"})
	require.NoError(t, err)
	out, _ = v.run("three", "ps", func(r *guestv1.CreateRequest) {
		r.PidNamespace, r.TargetPid = guestv1.PidNamespace_PID_TARGET, st.GetPid()
	})
	require.Contains(t, out, "sleep 1000")
	// The first process's end ends the container's others, but nobody else.
	require.NoError(t, v.signal("one", "", 9, false))
	v.wait("one", "")
	_, err = io.ReadAll(one)
	require.NoError(t, err)
	v.delete("one", "")
	out, _ = v.run("four", "kill -TERM 1; kill -HUP 1; sleep 0.2; ps", inPodPids)
	require.Contains(t, out, "pod-pause")
	require.NotContains(t, out, "sleep 1000")
	_, err = v.tasks.Create(v.ctx(), &guestv1.CreateRequest{
		Id: "five", Spec: testSpec("false", "true"), Rootfs: &guestv1.RootFS{ImageSerial: testImage},
		PidNamespace: guestv1.PidNamespace_PID_TARGET, TargetPid: 1,
	})
	require.Equal(t, codes.NotFound, status.Code(err), "%v", err)
}

func (v *vm) pause(t *testing.T) {
	conn := v.create("p", "echo up; while :; do echo .; sleep 0.05; done")
	v.start("p", "")
	up(t, conn)
	go func() { _, _ = io.Copy(io.Discard, conn) }()
	_, err := v.tasks.Pause(v.ctx(), &guestv1.PauseRequest{Id: "p"})
	require.NoError(t, err)
	st, err := v.tasks.State(v.ctx(), &guestv1.StateRequest{Id: "p"})
	require.NoError(t, err)
	require.Equal(t, guestv1.Status_STATUS_PAUSED, st.GetStatus())
	_, err = v.tasks.Pause(v.ctx(), &guestv1.PauseRequest{Id: "p"})
	require.Equal(t, codes.FailedPrecondition, status.Code(err))
	_, err = v.tasks.Resume(v.ctx(), &guestv1.ResumeRequest{Id: "p"})
	require.NoError(t, err)
	_, err = v.tasks.Pause(v.ctx(), &guestv1.PauseRequest{Id: "p"})
	require.NoError(t, err)
	v.end("p") // killed while paused
}

func (v *vm) update(t *testing.T) {
	v.create("u", "echo hello > /file; sleep 1000")
	v.start("u", "")
	_, err := v.tasks.Update(v.ctx(), &guestv1.UpdateRequest{Id: "u", Resources: []byte(`{"memory":{"limit":33554432},"pids":{"limit":77},"cpu":{"quota":20000,"period":100000}}`)})
	require.NoError(t, err)
	stats, err := v.tasks.Stats(v.ctx(), &guestv1.StatsRequest{Id: "u"})
	require.NoError(t, err)
	require.EqualValues(t, 33554432, stats.GetMemory().GetUsageLimit())
	require.EqualValues(t, 77, stats.GetPids().GetLimit())
	require.NotZero(t, stats.GetCpu().GetUsageUsec())
	require.NotZero(t, stats.GetMemory().GetUsage())
	require.NotEmpty(t, stats.GetMemory().GetStat())
	require.NotZero(t, stats.GetWritableInodes())
	v.end("u")
}

func (v *vm) outOfMemory(t *testing.T) {
	v.create("oom", "x=a; while :; do x=$x$x; done", func(r *guestv1.CreateRequest) {
		r.Spec = bytes.Replace(r.Spec, []byte(`"limit":67108864`), []byte(`"limit":8388608`), 1)
	})
	v.start("oom", "")
	w := v.wait("oom", "")
	require.EqualValues(t, 137, w.GetExitStatus())
	require.NotZero(t, w.GetOomKills())
	stats, err := v.tasks.Stats(v.ctx(), &guestv1.StatsRequest{Id: "oom"})
	require.NoError(t, err)
	require.NotZero(t, stats.GetMemory().GetOomKill())
	v.delete("oom", "")
}
