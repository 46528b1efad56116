// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	coltracepb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/cloudhv/containerd-cloudhv/e2e/testimage"
	"github.com/cloudhv/containerd-cloudhv/e2e/testnode"
)

// collector is an OTLP receiver.
type collector struct {
	*httptest.Server
	mu    sync.Mutex
	spans map[string]*tracepb.Span // by ID
}

func newCollector(t *testing.T) *collector {
	t.Helper()
	c := &collector{spans: map[string]*tracepb.Span{}}
	c.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var req coltracepb.ExportTraceServiceRequest
		body, err := io.ReadAll(r.Body)
		if err = errors.Join(err, proto.Unmarshal(body, &req)); err != nil || r.URL.Path != "/v1/traces" {
			http.Error(w, fmt.Sprint(r.URL.Path, err), http.StatusBadRequest)
			return
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, rs := range req.GetResourceSpans() {
			for _, ss := range rs.GetScopeSpans() {
				for _, s := range ss.GetSpans() {
					c.spans[string(s.GetSpanId())] = s
				}
			}
		}
	}))
	t.Cleanup(c.Close)
	return c
}

// path is a span's ancestry by name, from the root, as "a > b > c".
func (c *collector) path(s *tracepb.Span) string {
	path := s.GetName()
	for len(s.GetParentSpanId()) > 0 {
		parent, ok := c.spans[string(s.GetParentSpanId())]
		if !ok {
			return "? > " + path
		}
		if !bytes.Equal(parent.GetTraceId(), s.GetTraceId()) {
			return "of another trace: " + path
		}
		s, path = parent, parent.GetName()+" > "+path
	}
	return path
}

// paths are those of all spans.
func (c *collector) paths() map[string]*tracepb.Span {
	c.mu.Lock()
	defer c.mu.Unlock()
	paths := map[string]*tracepb.Span{}
	for _, s := range c.spans {
		paths[c.path(s)] = s
	}
	return paths
}

// await waits until there is a span for each pattern of a path, and returns them.
func (c *collector) await(t *testing.T, patterns ...string) map[string]*tracepb.Span {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testnode.Scale(30*time.Second))
	defer cancel()
	found := map[string]*tracepb.Span{}
	err := testnode.Eventually(ctx, func(context.Context) error {
		paths := c.paths()
		for _, pattern := range patterns {
			re := regexp.MustCompile("^" + pattern + "$")
			for path, span := range paths {
				if re.MatchString(path) {
					found[pattern] = span
				}
			}
			if found[pattern] == nil {
				var all []string
				for path := range paths {
					if strings.Contains(path, "cloudhv") {
						all = append(all, path)
					}
				}
				slices.Sort(all)
				return fmt.Errorf("no span %q in\n%s", pattern, strings.Join(all, "\n"))
			}
		}
		return nil
	})
	require.NoError(t, err)
	return found
}

// freeAddress is where nothing listens.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	return l.Addr().String()
}

// scrape reads containerd's metrics.
func scrape(t *testing.T, address string) map[string]*dto.MetricFamily {
	t.Helper()
	req, err := http.NewRequestWithContext(testContext(t), http.MethodGet, "http://"+address+"/v1/metrics", nil)
	require.NoError(t, err)
	resp, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	require.Equal(t, http.StatusOK, resp.StatusCode)
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(resp.Body)
	require.NoError(t, err)
	return families
}

// sample is the value of a series, of a histogram how much it has seen.
func sample(t *testing.T, families map[string]*dto.MetricFamily, name string, labels ...string) float64 {
	t.Helper()
	for _, m := range families["containerd_cloudhv_"+name].GetMetric() {
		var got []string
		for _, l := range m.GetLabel() {
			got = append(got, l.GetValue())
		}
		if slices.Equal(got, labels) {
			return float64(m.GetHistogram().GetSampleCount()) + m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	require.Fail(t, "no such series", "%s %v", name, labels)
	return 0
}

// TestObserve looks at pods from outside: a hit, a container and an exec in it, and
// the end; a restart of containerd between.
func TestObserve(t *testing.T) {
	otlp, address := newCollector(t), freeAddress(t)
	n := poolNode(t, map[string]any{"min": 1, "max": 2}, func(o *testnode.Options) {
		o.Metrics = address
		o.Env = []string{"OTEL_EXPORTER_OTLP_ENDPOINT=" + otlp.URL, "OTEL_BSP_SCHEDULE_DELAY=50"}
	})
	img, err := testimage.Helper(suite.helper)
	require.NoError(t, err)
	require.NoError(t, n.Import(testContext(t), testimage.HelperRef, img))
	p := awaitOutcome(t, n, "hit")
	box := p.idle("box")
	assert.Equal(t, "hi\n", box.sh("echo hi"))

	t.Run("log", func(t *testing.T) { oneLogLine(t, n, p.id) })
	t.Run("start", func(t *testing.T) { startTrace(t, otlp) })
	t.Run("metrics", func(t *testing.T) { metricsOfAPod(t, scrape(t, address)) })
	t.Run("dashboard", func(t *testing.T) { checkDashboard(t, scrape(t, address)) })
	t.Run("restart", func(t *testing.T) {
		require.NoError(t, n.Restart(testContext(t), true))
		f := scrape(t, address)
		assert.EqualValues(t, 1, sample(t, f, "vms", "sandbox"))
		assert.EqualValues(t, 1, sample(t, f, "sandboxes", "ready"))
		assert.EqualValues(t, 1, sample(t, f, "recovered_sandboxes_total", "ready"))
		assert.Positive(t, sample(t, f, "snapshot_bytes", "current"))
	})
	p.remove()
	t.Run("end", func(t *testing.T) {
		const end = "runtime.v1.RuntimeService/StopPodSandbox > cloudhv.end"
		otlp.await(t, end, end+" > cloudhv.end.power_off", end+" > cloudhv.end.kill", end+" > cloudhv.end.network", end+" > cloudhv.end.files")
		assert.Zero(t, sample(t, scrape(t, address), "vms", "sandbox"))
	})
}

// oneLogLine checks what is logged at level info of a pod's start.
func oneLogLine(t *testing.T, n *testnode.Node, id string) {
	t.Helper()
	text, err := os.ReadFile(n.LogPath())
	require.NoError(t, err)
	var lines []string
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, "started sandbox") && strings.Contains(line, id) {
			lines = append(lines, line)
		}
	}
	require.Len(t, lines, 1)
	t.Log(lines[0])
	for _, want := range []string{
		`level=info`, `outcome=hit`, `total=[0-9.]+m?s`, `phases="[^"]*\bacquire [0-9.]+ ms, [^"]*configure [0-9.]+ ms[,"]`, `pid=\d+`, `sandbox=` + id,
	} {
		assert.Regexp(t, want, lines[0])
	}
}

// startTrace checks the trees of a pod's start, of a container's, and of the pool's
// own work, and that children lie within their parents.
func startTrace(t *testing.T, otlp *collector) {
	t.Helper()
	const (
		run    = `runtime\.v1\.RuntimeService/RunPodSandbox > cri\.sandbox\.run > `
		start  = run + `cloudhv\.start`
		create = `runtime\.v1\.RuntimeService/StartContainer > .*containerd\.task\.v3\.Task/Create`
		refill = `cloudhv\.pool\.refill`
		base   = `cloudhv\.pool\.snapshot`
	)
	want := []string{
		run + `cloudhv\.create`, start, start + ` > cloudhv\.start\.network`, start + ` > cloudhv\.start\.shim`, start + ` > cloudhv\.start\.join`,
		start + ` > cloudhv\.start\.acquire`, start + ` > cloudhv\.start\.acquire > cloudhv\.pool\.acquire > cloudhv\.pool\.hand_over`,
		start + ` > cloudhv\.start\.configure > cloudhv\.guest\.clock`, start + ` > cloudhv\.start\.configure > cloudhv\.guest\.network`,
		create + ` > cloudhv\.task\.create > cloudhv\.task\.create\.guest > cloudhv\.guest\.crun create`,
		create + ` > cloudhv\.task\.create > cloudhv\.task\.create\.guest > cloudhv\.guest\.image`,
		create + ` > cloudhv\.task\.create > cloudhv\.task\.create\.image`, create + ` > cloudhv\.host\.v1\.Host/AttachRootFS`,
		`runtime\.v1\.RuntimeService/StartContainer > .*Task/Start > cloudhv\.task\.start`,
		`runtime\.v1\.RuntimeService/ExecSync > .*Task/Start > cloudhv\.task\.exec`,
		refill + ` > cloudhv\.pool\.restore`,
		base + ` > cloudhv\.pool\.boot`, base + ` > cloudhv\.pool\.save`, base + ` > cloudhv\.pool\.restore`,
	}
	if !suite.kvm { // by default a VM is warmed up where its code has to be translated
		want = append(want, refill+` > cloudhv\.pool\.warm_up`)
	}
	found := otlp.await(t, want...)
	otlp.mu.Lock()
	defer otlp.mu.Unlock()
	for pattern, s := range found {
		t.Logf("%7.1f ms  %s", float64(s.GetEndTimeUnixNano()-s.GetStartTimeUnixNano())/1e6, otlp.path(s))
		parent, ok := otlp.spans[string(s.GetParentSpanId())]
		if !ok {
			continue
		}
		// The shim's and the guest's are taken by other clocks' ticks.
		const slack = uint64(time.Millisecond)
		assert.GreaterOrEqual(t, s.GetStartTimeUnixNano()+slack, parent.GetStartTimeUnixNano(), pattern)
		assert.LessOrEqual(t, s.GetEndTimeUnixNano(), parent.GetEndTimeUnixNano()+slack, pattern)
		assert.Less(t, s.GetStartTimeUnixNano(), s.GetEndTimeUnixNano()+1, pattern)
	}
}

// metricsOfAPod checks what a scrape says after TestObserve's pods.
func metricsOfAPod(t *testing.T, f map[string]*dto.MetricFamily) {
	t.Helper()
	assert.EqualValues(t, 1, sample(t, f, "fit"))
	assert.EqualValues(t, 1, sample(t, f, "vms", "sandbox"))
	assert.EqualValues(t, 1, sample(t, f, "sandbox_starts_total", "hit", "ok"))
	assert.EqualValues(t, 1, sample(t, f, "sandbox_start_seconds", "hit"))
	assert.EqualValues(t, 1, sample(t, f, "pool_acquire_total", "hit"))
	assert.Positive(t, sample(t, f, "start_phase_seconds", "acquire"))
	assert.EqualValues(t, 1, sample(t, f, "task_calls_total", "create", "ok"))
	assert.EqualValues(t, 1, sample(t, f, "task_calls_total", "start", "ok"))
	assert.Positive(t, sample(t, f, "task_calls_total", "exec", "ok"))
	assert.EqualValues(t, 1, sample(t, f, "task_phase_seconds", "guest"))
	assert.EqualValues(t, 1, sample(t, f, "pool_snapshot_usable"))
	assert.EqualValues(t, 2, sample(t, f, "pool_max"))
	assert.Positive(t, sample(t, f, "pool_target"))
	assert.Positive(t, sample(t, f, "snapshot_bytes", "current"))
	assert.EqualValues(t, 1, sample(t, f, "pool_snapshot_seconds"))
}
