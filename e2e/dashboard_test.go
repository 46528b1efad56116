// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// dashboard is what of Grafana's file holds queries.
type dashboard struct {
	Panels []struct {
		Title   string `json:"title"`
		Targets []struct {
			Expr   string `json:"expr"`
			Legend string `json:"legendFormat"`
		} `json:"targets"`
	} `json:"panels"`
	Templating struct {
		List []struct {
			Name  string `json:"name"`
			Type  string `json:"type"`
			Query any    `json:"query"`
		} `json:"list"`
	} `json:"templating"`
}

// series are the values of each label of a metric, by the name that a query uses.
func series(families map[string]*dto.MetricFamily) map[string]map[string][]string {
	all := map[string]map[string][]string{}
	for name, f := range families {
		labels := map[string][]string{
			// Prometheus's own.
			"instance": nil, "job": nil,
		}
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = append(labels[l.GetName()], l.GetValue())
			}
		}
		if f.GetType() != dto.MetricType_HISTOGRAM {
			all[name] = labels
			continue
		}
		all[name+"_sum"], all[name+"_count"] = labels, labels
		buckets := maps.Clone(labels)
		buckets["le"] = nil
		all[name+"_bucket"] = buckets
	}
	return all
}

var (
	selectorRE = regexp.MustCompile(`(containerd_[a-z0-9_]+)(?:\{([^}]*)\})?`)
	matcherRE  = regexp.MustCompile(`^\s*([a-z_]+)\s*(=~|!~|!=|=)\s*"([^"]*)"\s*$`)
	groupRE    = regexp.MustCompile(`\b(?:by|without)\s*\(([^)]*)\)`)
	legendRE   = regexp.MustCompile(`\{\{\s*([a-z_]+)\s*\}\}`)
	variableRE = regexp.MustCompile(`\$(?:\{([a-zA-Z_]+)\}|([a-zA-Z_]+))`)
)

// checkDashboard checks that each query of the dashboard is about metrics, labels
// and values that the scrape has.
func checkDashboard(t *testing.T, families map[string]*dto.MetricFamily) {
	t.Helper()
	text, err := os.ReadFile("../docs/dashboards/cloudhv.json")
	require.NoError(t, err)
	var d dashboard
	require.NoError(t, json.Unmarshal(text, &d))
	known := series(families)
	variables := []string{"__rate_interval"}
	for _, v := range d.Templating.List {
		variables = append(variables, v.Name)
		if v.Type == "query" {
			checkQuery(t, known, v.Query.(string), "")
		}
	}
	queries, used := 0, map[string]bool{}
	for _, p := range d.Panels {
		for _, target := range p.Targets {
			queries++
			for name := range checkQuery(t, known, target.Expr, target.Legend) {
				used[name] = true
			}
			for _, v := range variableRE.FindAllStringSubmatch(target.Expr, -1) {
				assert.Contains(t, variables, v[1]+v[2], target.Expr)
			}
		}
	}
	require.Greater(t, queries, 20)
	for name, f := range families {
		if strings.HasPrefix(name, "containerd_cloudhv_") && f.GetType() == dto.MetricType_GAUGE {
			assert.True(t, used[name], "no panel shows %s", name)
		}
	}
}

// checkQuery checks one query and what its legend shows, and returns the metrics.
func checkQuery(t assert.TestingT, known map[string]map[string][]string, expr, legend string) map[string]bool {
	assert.True(t, balanced(expr), "brackets or quotes in %q", expr)
	metrics, labels := map[string]bool{}, map[string]bool{}
	for _, m := range selectorRE.FindAllStringSubmatch(expr, -1) {
		metrics[m[1]] = true
		if !assert.Contains(t, known, m[1], "%q", expr) {
			continue
		}
		for l := range known[m[1]] {
			labels[l] = true
		}
		for part := range strings.SplitSeq(m[2], ",") {
			if strings.TrimSpace(part) != "" {
				checkMatcher(t, known[m[1]], part, expr)
			}
		}
	}
	assert.NotEmpty(t, metrics, "%q is about none of our metrics", expr)
	shown := labels
	for _, m := range groupRE.FindAllStringSubmatch(expr, -1) {
		shown = map[string]bool{}
		for l := range strings.SplitSeq(m[1], ",") {
			shown[strings.TrimSpace(l)] = true
			assert.True(t, labels[strings.TrimSpace(l)], "no metric of %q has the label %s", expr, l)
		}
	}
	for _, m := range legendRE.FindAllStringSubmatch(legend, -1) {
		assert.True(t, shown[m[1]], "the legend of %q shows the label %s", expr, m[1])
	}
	return metrics
}

// checkMatcher checks a label's matcher, whose value must be one of the scrape.
func checkMatcher(t assert.TestingT, labels map[string][]string, matcher, expr string) {
	m := matcherRE.FindStringSubmatch(matcher)
	if !assert.NotNil(t, m, "%q in %q", matcher, expr) {
		return
	}
	values, ok := labels[m[1]]
	assert.True(t, ok, "%q has no label %s", expr, m[1])
	if strings.HasPrefix(m[3], "$") {
		return
	}
	re, err := regexp.Compile("^(?:" + m[3] + ")$")
	if !assert.NoError(t, err, "%q", expr) {
		return
	}
	if strings.HasSuffix(m[2], "~") {
		assert.True(t, slices.ContainsFunc(values, re.MatchString), "no %s is like %s: %v", m[1], m[3], values)
	} else {
		assert.Contains(t, values, m[3], "%q", expr)
	}
}

// balanced tells whether brackets and quotes are closed in their order.
func balanced(expr string) bool {
	var open []rune
	quoted := false
	closes := map[rune]rune{')': '(', '}': '{', ']': '['}
	for _, r := range expr {
		switch {
		case r == '"':
			quoted = !quoted
		case quoted:
		case strings.ContainsRune("({[", r):
			open = append(open, r)
		case closes[r] != 0:
			if len(open) == 0 || open[len(open)-1] != closes[r] {
				return false
			}
			open = open[:len(open)-1]
		}
	}
	return !quoted && len(open) == 0
}

// complaints are what a check finds wrong.
type complaints []string

// Errorf implements assert.TestingT.
func (c *complaints) Errorf(format string, args ...any) {
	*c = append(*c, fmt.Sprintf(format, args...))
}

// TestDashboardQueries shows that a wrong query is found.
func TestDashboardQueries(t *testing.T) {
	t.Parallel()
	known := map[string]map[string][]string{
		"containerd_a_total": {"result": {"ok", "error"}, "instance": nil}, "containerd_b_bucket": {"le": nil, "instance": nil},
	}
	for expr, fine := range map[string]bool{
		`sum by (result) (rate(containerd_a_total{result="ok",instance=~"$instance"}[$__rate_interval]))`: true,
		`histogram_quantile(0.5, sum by (le) (rate(containerd_b_bucket[5m])))`:                            true,
		`sum(rate(containerd_a_total{result=~"e.*"}[5m]))`:                                                true,
		`sum(rate(containerd_a_total{result="failed"}[5m]))`:                                              false,
		`sum(rate(containerd_a_total{outcome="ok"}[5m]))`:                                                 false,
		`sum by (phase) (rate(containerd_a_total[5m]))`:                                                   false,
		`sum(rate(containerd_b[5m]))`:                                                                     false,
		`sum(rate(containerd_a_total[5m])`:                                                                false,
		`sum(rate(containerd_a_total{result="ok}[5m]))`:                                                   false,
		`up`: false,
	} {
		var found complaints
		checkQuery(&found, known, expr, "")
		assert.Equal(t, fine, len(found) == 0, "%q: %v", expr, found)
	}
}
