// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package promises

import (
	"flag"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/docs/testnames"
)

var update = flag.Bool("update", false, "write the table in docs/reliability.md anew")

// TestTestsAreThere: each promise has tests, and each that it names is one.
func TestTestsAreThere(t *testing.T) {
	t.Parallel()
	tests := testnames.Checker{Root: "../.."}
	for _, s := range Sections() {
		for _, p := range s.Promises {
			assert.NotEmpty(t, p.Tests, "%s: nothing tries it", p.Text)
			assert.NotContains(t, p.Text, "|", "it would end the table's cell")
			for _, test := range p.Tests {
				assert.NoError(t, tests.Check(test), p.Text)
			}
		}
	}
}

// TestDocument: the document's table is what the list says.
func TestDocument(t *testing.T) {
	t.Parallel()
	const file = "../reliability.md"
	b, err := os.ReadFile(file)
	require.NoError(t, err)
	before, rest, found := strings.Cut(string(b), begin)
	require.True(t, found)
	table, after, found := strings.Cut(rest, end)
	require.True(t, found)
	if *update {
		require.NoError(t, os.WriteFile(file, []byte(before+begin+Markdown()+end+after), 0o644))
		table = Markdown()
	}
	require.Equal(t, Markdown(), table, "go test ./docs/promises -update writes it anew")
}
