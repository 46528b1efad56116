// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package promises

import (
	"flag"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

var update = flag.Bool("update", false, "write the table in docs/reliability.md anew")

var testFunc = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`)

// testsIn are the tests of a package.
func testsIn(t *testing.T, dir string) map[string]bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("..", "..", dir, "*_test.go"))
	require.NoError(t, err)
	found := map[string]bool{}
	for _, f := range files {
		b, err := os.ReadFile(f)
		require.NoError(t, err)
		for _, m := range testFunc.FindAllStringSubmatch(string(b), -1) {
			found[m[1]] = true
		}
	}
	return found
}

// TestTestsAreThere: each promise has tests, and each that it names is one.
func TestTestsAreThere(t *testing.T) {
	t.Parallel()
	for _, s := range Sections() {
		for _, p := range s.Promises {
			assert.NotEmpty(t, p.Tests, "%s: nothing tries it", p.Text)
			assert.NotContains(t, p.Text, "|", "it would end the table's cell")
			for _, test := range p.Tests {
				dir, name, ok := strings.Cut(test, ":")
				if !ok {
					dir, name = "e2e", test
				}
				found := testsIn(t, dir)
				all, isPattern := strings.CutSuffix(name, "*")
				assert.True(t, found[name] || isPattern && slices.ContainsFunc(slices.Collect(maps.Keys(found)), func(n string) bool {
					return strings.HasPrefix(n, all)
				}), "%q names %s, which is no test of %s", p.Text, name, dir)
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
