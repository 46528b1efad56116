// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package controller

import (
	"bytes"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	hostv1 "github.com/cloudhv/containerd-cloudhv/controller/hostapi/v1"
	"github.com/cloudhv/containerd-cloudhv/vmpool"
)

// scrape gives the values of what our metrics count and show, by name and labels,
// histograms by how much they have seen.
func (n *node) scrape() map[string]float64 {
	n.t.Helper()
	reg := prometheus.NewRegistry()
	require.NoError(n.t, reg.Register(n.Controller))
	families, err := prometheus.Gatherers{reg, prometheus.DefaultGatherer}.Gather()
	require.NoError(n.t, err)
	values := map[string]float64{}
	for _, f := range families {
		name, ours := strings.CutPrefix(f.GetName(), "containerd_cloudhv_")
		if !ours {
			continue
		}
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetValue())
			}
			values[strings.Join(append([]string{name}, labels...), " ")] = valueOf(m)
		}
	}
	return values
}

func valueOf(m *dto.Metric) float64 {
	if m.GetHistogram() != nil {
		return float64(m.GetHistogram().GetSampleCount())
	}
	return m.GetCounter().GetValue() + m.GetGauge().GetValue()
}

// changed is what has changed between two scrapes.
func changed(before, after map[string]float64) map[string]float64 {
	d := map[string]float64{}
	for name, v := range after {
		if v != before[name] {
			d[name] = v - before[name]
		}
	}
	return d
}

// TestMetricsOfALife follows a sandbox that is booted, through a restart of
// containerd, to its end.
func TestMetricsOfALife(t *testing.T) {
	n := newNode(t)
	before := n.scrape()
	assert.Equal(t, 1.0, before["fit"])
	p := n.run("a")
	started := changed(before, n.scrape())
	for name, want := range map[string]float64{
		"sandbox_creates_total ok": 1, "sandbox_starts_total cold ok": 1, "sandbox_start_seconds cold": 1, "boot_seconds": 1,
		"sandboxes ready": 1, "vms sandbox": 1, "start_phase_seconds boot": 1, "start_phase_seconds network": 1,
		"start_phase_seconds configure": 1,
	} {
		assert.Equal(t, want, started[name], name)
	}
	for name := range started {
		assert.NotContains(t, name, "failures")
		assert.NotContains(t, name, "acquire", "there is no pool")
	}

	n.restart()
	again := n.scrape()
	assert.Equal(t, 1.0, again["sandboxes ready"])
	assert.Equal(t, 1.0, again["vms sandbox"])

	p, err := n.get(p.id)
	require.NoError(t, err)
	require.NoError(t, n.Stop(n.ctx(), "a"))
	stopped := changed(again, n.scrape())
	assert.Equal(t, map[string]float64{
		"sandboxes ready": -1, "sandboxes stopped": 1, "vms sandbox": -1, "sandbox_ends_total stop": 1, "sandbox_end_seconds": 1,
		"end_phase_seconds power_off": 1, "end_phase_seconds kill": 1, "end_phase_seconds network": 1, "end_phase_seconds files": 1,
	}, stopped)
	require.NoError(t, n.Shutdown(n.ctx(), p.id))
	assert.Zero(t, n.scrape()["sandboxes stopped"])
}

// TestMetricsOfThePool: the gauges are the pool's, at each moment, and phases that
// are measured have a series from the beginning.
func TestMetricsOfThePool(t *testing.T) {
	n := poolNode(t, 1, 3)
	n.awaitPool("a VM is ready", func(s vmpool.Status) bool { return s.Ready == 1 && s.Making == 0 })
	full := n.scrape()
	for name, want := range map[string]float64{
		"pool_depth": 1, "pool_target": 1, "pool_max": 3, "vms ready": 1, "vms making": 0, "vms sandbox": 0,
		"pool_memory_bytes": vmMemory, "pool_memory_max_bytes": 1 << 40, "pool_snapshot_usable": 1,
		"pool_consecutive_failures": 0, "pool_pause_seconds": 0, "snapshot_bytes damaged": 0, "snapshot_bytes making": 0,
	} {
		assert.Equal(t, want, full[name], name)
	}
	assert.Positive(t, full["snapshot_bytes current"])
	p := n.run("a")
	hit := changed(full, n.scrape())
	assert.Equal(t, 1.0, hit["sandbox_starts_total hit ok"])
	assert.Equal(t, 1.0, hit["pool_acquire_total hit"])
	assert.NotContains(t, hit, "boot_seconds")
	require.NoError(t, n.Stop(n.ctx(), "a"))
	for _, ph := range p.snapshot().Phases {
		if !strings.HasPrefix(ph.Name, guestPhase) {
			assert.Contains(t, full, "start_phase_seconds "+ph.Name)
		}
	}
	n.pool.Drain()
	n.awaitPool("it is empty", func(s vmpool.Status) bool { return s.Ready+s.Making == 0 })
	drained := n.scrape()
	assert.Zero(t, drained["pool_depth"])
	assert.Zero(t, drained["pool_target"])
	assert.Equal(t, slices.Sorted(maps.Keys(full)), slices.Sorted(maps.Keys(drained)), "no series comes late")
}

// TestMetricsOfFailures: a failure is counted where it happened, and not for what
// it cut short.
func TestMetricsOfFailures(t *testing.T) {
	n := newNode(t)
	n.driver.vm.nic = errInjected
	require.NoError(t, n.create("a"))
	before := n.scrape()
	_, err := n.Start(n.ctx(), "a")
	require.ErrorIs(t, err, errInjected)
	d := changed(before, n.scrape())
	assert.Equal(t, 1.0, d["sandbox_starts_total cold error"])
	assert.Equal(t, 1.0, d["sandbox_ends_total start"])
	for name := range d {
		if strings.Contains(name, "failures") {
			assert.Equal(t, "start_phase_failures_total join", name)
		}
	}
	assert.NotContains(t, d, "sandbox_start_seconds cold")

	n.driver.vm.nic, n.driver.bootErr = nil, errInjected
	require.NoError(t, n.create("b"))
	before = n.scrape()
	_, err = n.Start(n.ctx(), "b")
	require.ErrorIs(t, err, errInjected)
	d = changed(before, n.scrape())
	assert.Equal(t, 1.0, d["sandbox_starts_total none error"])
	assert.Equal(t, 1.0, d["start_phase_failures_total boot"])
}

// record collects the spans that end from now on.
func recordSpans(t *testing.T) *tracetest.SpanRecorder {
	t.Helper()
	rec := tracetest.NewSpanRecorder()
	old := otel.GetTracerProvider()
	otel.SetTracerProvider(trace.NewTracerProvider(trace.WithSpanProcessor(rec)))
	t.Cleanup(func() { otel.SetTracerProvider(old) })
	return rec
}

// tree gives the name of each span's parent, by its own; the one given has "".
func tree(spans []trace.ReadOnlySpan) map[string]string {
	names := map[string]string{}
	for _, s := range spans {
		names[s.SpanContext().SpanID().String()] = s.Name()
	}
	parents := map[string]string{}
	for _, s := range spans {
		parents[s.Name()] = names[s.Parent().SpanID().String()]
	}
	return parents
}

// TestSpans: a start is a tree from the caller's span to the guest's steps, which
// lie within the call that told of them; what happens later is no part of it.
func TestSpans(t *testing.T) {
	n := newNode(t)
	rec := recordSpans(t)
	require.NoError(t, n.create("a"))
	ctx, caller := otel.Tracer("").Start(n.ctx(), "caller")
	_, err := n.Start(ctx, "a")
	require.NoError(t, err)
	caller.End()
	spans := rec.Ended()
	parents := tree(spans)
	for name, parent := range map[string]string{
		"cloudhv.create": "", "cloudhv.start": "caller", "cloudhv.start.network": "cloudhv.start", "cloudhv.start.boot": "cloudhv.start",
		"cloudhv.start.join": "cloudhv.start", "cloudhv.start.configure": "cloudhv.start", "cloudhv.guest.kernel": "cloudhv.start",
		"cloudhv.guest.clock": "cloudhv.start.configure", "cloudhv.guest.network": "cloudhv.start.configure",
	} {
		assert.Contains(t, parents, name)
		assert.Equal(t, parent, parents[name], name)
	}
	byName := map[string]trace.ReadOnlySpan{}
	for _, s := range spans {
		byName[s.Name()] = s
	}
	call, step := byName["cloudhv.start.configure"], byName["cloudhv.guest.network"]
	assert.False(t, step.StartTime().Before(call.StartTime()))
	assert.False(t, step.EndTime().After(call.EndTime()), "a guest that says that its step took years")

	n.driver.only(t).die("killed by a test", false)
	require.Eventually(t, func() bool { return tree(rec.Ended())["cloudhv.end.files"] != "" }, 10*time.Second, time.Millisecond)
	for _, s := range rec.Ended() {
		if strings.HasPrefix(s.Name(), "cloudhv.end") {
			assert.NotEqual(t, caller.SpanContext().TraceID(), s.SpanContext().TraceID(), s.Name())
		}
	}
}

// TestReport: a shim's report is metrics and, where its caller has a trace, spans
// in it; nothing that it says is out of bounds.
func TestReport(t *testing.T) {
	n := newNode(t)
	n.run("a")
	rec := recordSpans(t)
	_, caller := otel.Tracer("").Start(n.ctx(), "caller")
	sc := caller.SpanContext()
	md := ttrpc.MD{}
	md.Set("traceparent", "00-"+sc.TraceID().String()+"-"+sc.SpanID().String()+"-01")
	ctx := ttrpc.WithMetadata(namespaces.WithNamespace(t.Context(), testNamespace), md)
	began := time.Now().Add(-time.Second)
	req := &hostv1.ReportRequest{
		SandboxId: "a", ContainerId: "c", Call: "create", BeganUnixNano: began.UnixNano(), TookUsec: 1e6,
		Parts: []*hostv1.Part{
			{Name: "image", TookUsec: 1000}, {Name: "guest", AtUsec: 5000, TookUsec: 3000},
			{Name: "rootfs", AtUsec: 5000, TookUsec: 1 << 62, Guest: true}, {Name: "image", AtUsec: 1 << 63, Guest: true},
			{Name: "in\x1bvented", AtUsec: 1, TookUsec: 1},
		},
	}
	before := n.scrape()
	_, err := n.HostService().Report(ctx, req)
	require.NoError(t, err)
	assert.Equal(t, map[string]float64{
		"task_calls_total create ok": 1, "task_call_seconds create": 1, "task_phase_seconds image": 1, "task_phase_seconds guest": 1,
	}, changed(before, n.scrape()), "no guest makes a series")
	caller.End()
	spans := rec.Ended()
	parents := tree(spans)
	for name, parent := range map[string]string{
		"cloudhv.task.create": "caller", "cloudhv.task.create.image": "cloudhv.task.create", "cloudhv.task.create.guest": "cloudhv.task.create",
		"cloudhv.guest.rootfs": "cloudhv.task.create.guest", "cloudhv.task.create.in?vented": "cloudhv.task.create",
	} {
		assert.Contains(t, parents, name)
		assert.Equal(t, parent, parents[name], name)
	}
	for _, s := range spans {
		if strings.HasPrefix(s.Name(), "cloudhv.guest.") {
			assert.False(t, s.EndTime().After(began.Add(8*time.Millisecond)), "%s is over when the guest has answered", s.Name())
		}
		if s.Name() != "caller" {
			assert.False(t, s.StartTime().Before(began.Add(-time.Microsecond)) || s.EndTime().After(began.Add(time.Second)), s.Name())
		}
	}

	// Without a trace there are no spans, and a call that is not known is not counted.
	req.Call, req.Failed = "create", true
	before = n.scrape()
	_, err = n.HostService().Report(n.ctx(), req)
	require.NoError(t, err)
	assert.Equal(t, map[string]float64{"task_calls_total create error": 1}, changed(before, n.scrape()))
	assert.Len(t, rec.Ended(), len(spans))
	req.Call = "invented"
	_, err = n.HostService().Report(n.ctx(), req)
	require.NoError(t, err)
	req.SandboxId = "b"
	_, err = n.HostService().Report(n.ctx(), req)
	require.Error(t, err)
	assert.Equal(t, map[string]float64{"task_calls_total create error": 1}, changed(before, n.scrape()))
}

// TestStartLog: a start is one line at info, with all that it took.
func TestStartLog(t *testing.T) {
	n := newNode(t)
	require.NoError(t, n.create("a"))
	var out bytes.Buffer
	logger := logrus.New()
	logger.SetOutput(&out)
	_, err := n.Start(log.WithLogger(n.ctx(), logrus.NewEntry(logger)), "a")
	require.NoError(t, err)
	require.Equal(t, 1, strings.Count(out.String(), "\n"), out.String())
	assert.Regexp(t, `level=info msg="started sandbox" outcome=cold phases="([a-z]+ [0-9.]+ ms, )*boot [0-9.]+ ms, ([a-z]+ [0-9.]+ ms, )*configure [0-9.]+ ms(, (shim|join) [0-9.]+ ms)*" `+
		`pid=\d+ sandbox=a shim=\d+ total=[0-9.]+ms`, out.String())
	assert.NotContains(t, out.String(), guestPhase)
}
