// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package shim

import (
	"testing"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	hostv1 "github.com/cloudhv/containerd-cloudhv/controller/hostapi/v1"
	guestv1 "github.com/cloudhv/containerd-cloudhv/guest/api/v1"
)

// awaitReports returns what the shim has reported when there are n of it.
func (d *fakeDaemon) awaitReports(n int) []*hostv1.ReportRequest {
	d.t.Helper()
	var out []*hostv1.ReportRequest
	eventually(d.t, "reports", func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		out = append([]*hostv1.ReportRequest(nil), d.reports...)
		return len(out) >= n
	})
	require.Len(d.t, out, n)
	return out
}

// TestReports: containerd is told how long a create, a start and an exec took, as
// part of the trace that it gave.
func TestReports(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.guest.steps = []*guestv1.Step{{Name: "rootfs\x1b[2J", Usec: 7}, {Name: "crun create", Usec: 1 << 63}}
	const parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	md := ttrpc.MD{}
	md.Set("traceparent", parent)
	ctx := ttrpc.WithMetadata(testContext(t), md)
	began := time.Now()
	_, err := p.client.Create(ctx, p.createRequest("c", nil, "sleep"))
	require.NoError(t, err)
	_, err = p.client.Start(ctx, &taskapi.StartRequest{ID: "c"})
	require.NoError(t, err)
	p.exec("c", "e", nil, "sleep")
	_, err = p.client.Start(testContext(t), &taskapi.StartRequest{ID: "c", ExecID: "e"})
	require.NoError(t, err)

	calls := map[string]*hostv1.ReportRequest{}
	for _, r := range p.daemon.awaitReports(3) {
		calls[r.Call] = r
		assert.Equal(t, "sb", r.SandboxId)
		assert.Equal(t, "c", r.ContainerId)
		assert.False(t, r.Failed)
		assert.WithinRange(t, time.Unix(0, r.BeganUnixNano), began, time.Now())
		assert.LessOrEqual(t, r.TookUsec, uint64(time.Since(began).Microseconds()))
	}
	require.Contains(t, calls, "start")
	require.Contains(t, calls, "exec")
	require.Contains(t, calls, "create")
	var names []string
	for _, part := range calls["create"].Parts {
		names = append(names, part.Name)
		assert.Equal(t, len(names) > 4, part.Guest, part.Name)
	}
	assert.Equal(t, []string{"image", "connect", "streams", "guest", "rootfs [2J", "crun create"}, names)
	assert.LessOrEqual(t, calls["create"].Parts[5].TookUsec, usec(createLimit))
	p.daemon.mu.Lock()
	defer p.daemon.mu.Unlock()
	assert.Equal(t, map[string]string{
		"AttachRootFS": parent, "Report create": parent, "Report start": parent, "Report exec": "",
	}, p.daemon.traces)
}

// TestReportOfFailure tells of a create that failed, and a containerd that is away
// costs no call anything.
func TestReportOfFailure(t *testing.T) {
	t.Parallel()
	p := newPod(t)
	p.guest.failing("Create", errdefs.ErrInternal)
	_, err := p.client.Create(testContext(t), p.createRequest("c", nil, "sleep"))
	require.Error(t, err)
	assert.True(t, p.daemon.awaitReports(1)[0].Failed)
	p.guest.fine()
	p.create("c", nil, "sleep")
	p.daemon.awaitReports(2)
	p.daemon.stop()
	began := time.Now()
	_, err = p.client.Start(testContext(t), &taskapi.StartRequest{ID: "c"})
	require.NoError(t, err)
	assert.Less(t, time.Since(began), reportLimit)
}
