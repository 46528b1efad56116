// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package docs

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/controller"
	_ "github.com/cloudhv/containerd-cloudhv/controller/prebuild" // its metrics
)

// metric is what a document and a registry both say of one.
type metric struct {
	Type   string
	Labels map[string][]string // values by name
}

// registered are our metrics in a process like containerd's.
func registered(t *testing.T) map[string]metric {
	t.Helper()
	reg := prometheus.NewRegistry()
	require.NoError(t, reg.Register(controller.New(controller.Options{})))
	families, err := prometheus.Gatherers{reg, prometheus.DefaultGatherer}.Gather()
	require.NoError(t, err)
	all := map[string]metric{}
	for _, f := range families {
		if !strings.HasPrefix(f.GetName(), "containerd_cloudhv_") {
			continue
		}
		m := metric{Type: strings.ToLower(f.GetType().String()), Labels: map[string][]string{}}
		for _, s := range f.GetMetric() {
			for _, l := range s.GetLabel() {
				if !slices.Contains(m.Labels[l.GetName()], l.GetValue()) {
					m.Labels[l.GetName()] = append(m.Labels[l.GetName()], l.GetValue())
				}
			}
		}
		all[f.GetName()] = m
	}
	return all
}

// documented are those of the tables.
func documented(t *testing.T) map[string]metric {
	t.Helper()
	text, err := os.ReadFile("metrics.md")
	require.NoError(t, err)
	all := map[string]metric{}
	for _, row := range regexp.MustCompile("(?m)^\\| `(containerd_cloudhv_[a-z_]+)` \\| ([a-z]+) \\|([^|]*)\\| [^|]+ \\|[^|]*\\|$").FindAllStringSubmatch(string(text), -1) {
		m := metric{Type: row[2], Labels: map[string][]string{}}
		for label := range strings.SplitSeq(row[3], ";") {
			if name, values, ok := strings.Cut(label, ":"); ok {
				m.Labels[strings.Trim(name, " `")] = strings.Split(strings.TrimSpace(values), ", ")
			}
		}
		require.NotContains(t, all, row[1], "twice")
		all[row[1]] = m
	}
	return all
}

// TestMetrics: every metric is in the tables with its type, its labels and their
// values, and no other is.
func TestMetrics(t *testing.T) {
	t.Parallel()
	want, got := registered(t), documented(t)
	require.Greater(t, len(want), 25)
	for _, all := range []map[string]metric{want, got} {
		for _, m := range all {
			for _, values := range m.Labels {
				slices.Sort(values)
			}
		}
	}
	require.Equal(t, want, got)
}
