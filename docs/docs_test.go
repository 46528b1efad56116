// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package docs has no code: its test keeps the documents true to the code where
// that can be checked.
package docs

import (
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/cloudhv/containerd-cloudhv/controller/annotation"
	"github.com/cloudhv/containerd-cloudhv/controller/config"
)

// options are the keys of a configuration with their defaults as documented.
func options(prefix string, v reflect.Value) map[string]string {
	keys := map[string]string{}
	for i := range v.NumField() {
		key := prefix + strings.Split(v.Type().Field(i).Tag.Get("toml"), ",")[0]
		switch f := v.Field(i).Elem(); f.Kind() {
		case reflect.Struct:
			maps.Copy(keys, options(key+".", f))
		case reflect.Slice:
			var words []string
			for j := range f.Len() {
				words = append(words, "'"+f.Index(j).String()+"'")
			}
			keys[key] = "[" + strings.Join(words, ", ") + "]"
		default:
			if keys[key] = fmt.Sprint(f.Interface()); keys[key] == "" {
				keys[key] = "''"
			}
		}
	}
	return keys
}

// TestOptions: every option is in the tables, with its default, and no other is.
func TestOptions(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("configuration.md")
	require.NoError(t, err)
	_, plugin, found := strings.Cut(string(text), "## The plugin")
	require.True(t, found)
	plugin, _, _ = strings.Cut(plugin, "## Annotations")
	documented := map[string]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\| `([^`]+)` \\|").FindAllStringSubmatch(plugin, -1) {
		documented[row[1]] = row[2]
	}
	require.Equal(t, options("", reflect.ValueOf(*config.Default())), documented)
}

// TestAnnotations: every annotation is documented, and no other is, but for that
// which is another's other name.
func TestAnnotations(t *testing.T) {
	t.Parallel()
	var want []string
	for _, name := range annotation.Names() {
		if name = strings.TrimPrefix(name, annotation.Own); name != annotation.MemoryLimit {
			want = append(want, name)
		}
	}
	text, err := os.ReadFile("configuration.md")
	require.NoError(t, err)
	var got []string
	for _, m := range regexp.MustCompile("(?m)^\\| `io\\.cloudhv\\.([a-z_]+)` \\|").FindAllStringSubmatch(string(text), -1) {
		got = append(got, m[1])
	}
	require.NotEmpty(t, want)
	require.ElementsMatch(t, want, got)
}

// TestPaths: what a document links to, or names as a path of this repository, is there.
func TestPaths(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("*.md")
	require.NoError(t, err)
	link := regexp.MustCompile(`\]\(([^)#]+)\)`)
	named := regexp.MustCompile("`((?:plugin|controller|vmpool|guest|containerd-build|hack|e2e|docs)/[a-zA-Z0-9_./-]*)`")
	for _, file := range append(files, "../README.md", "../CONTRIBUTING.md") {
		text, err := os.ReadFile(file)
		require.NoError(t, err)
		for _, m := range link.FindAllStringSubmatch(string(text), -1) {
			if !strings.Contains(m[1], "://") {
				require.FileExists(t, filepath.Join(filepath.Dir(file), m[1]), "linked in %s", file)
			}
		}
		for _, m := range named.FindAllStringSubmatch(string(text), -1) {
			_, err := os.Stat(filepath.Join("..", m[1]))
			require.NoError(t, err, "named in %s", file)
		}
	}
}

// everywhere are the documents outside of this directory too.
func everywhere(t *testing.T) map[string]string {
	t.Helper()
	files, err := filepath.Glob("*.md")
	require.NoError(t, err)
	texts := map[string]string{}
	for _, file := range append(files, "../README.md", "../CONTRIBUTING.md", "../e2e/README.md") {
		text, err := os.ReadFile(file)
		require.NoError(t, err)
		texts[file] = string(text)
	}
	return texts
}

// TestTargets: what a document has make do, the Makefile can, with the variables
// that are named.
func TestTargets(t *testing.T) {
	t.Parallel()
	makefile, err := os.ReadFile("../Makefile")
	require.NoError(t, err)
	targets := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^([a-z0-9-]+):`).FindAllStringSubmatch(string(makefile), -1) {
		targets[m[1]] = true
	}
	require.True(t, targets["demo"])
	command := regexp.MustCompile("(?m)(?:^|`)make ([a-z0-9-]+)((?: +[A-Z]+=[^ `]+)*)")
	for file, text := range everywhere(t) {
		for _, m := range command.FindAllStringSubmatch(text, -1) {
			require.True(t, targets[m[1]], "%s names make %s", file, m[1])
			for word := range strings.FieldsSeq(m[2]) {
				name, _, _ := strings.Cut(word, "=")
				require.Contains(t, string(makefile), name, "%s names %s", file, word)
			}
		}
	}
}

// TestEnvironment: the variables of the end-to-end tests are documented in both
// places, and no other is.
func TestEnvironment(t *testing.T) {
	t.Parallel()
	variable := regexp.MustCompile(`\bE2E_[A-Z_]+\b`)
	used := map[string]bool{}
	err := filepath.WalkDir("../e2e", func(path string, d fs.DirEntry, err error) error {
		if err != nil || filepath.Ext(path) != ".go" {
			return err
		}
		text, err := os.ReadFile(path)
		for _, m := range regexp.MustCompile(`(?:Getenv|LookupEnv)\("(E2E_[A-Z_]+)"\)`).FindAllStringSubmatch(string(text), -1) {
			used[m[1]] = true
		}
		return err
	})
	require.NoError(t, err)
	require.Greater(t, len(used), 5)
	for _, file := range []string{"development.md", "../e2e/README.md"} {
		documented := map[string]bool{}
		for _, name := range variable.FindAllString(everywhere(t)[file], -1) {
			documented[name] = true
		}
		require.Equal(t, used, documented, file)
	}
}

// TestEndToEndTable: the table of the end-to-end tests' files has each that has tests.
func TestEndToEndTable(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../e2e/README.md")
	require.NoError(t, err)
	var patterns []string
	for _, name := range regexp.MustCompile("`([a-z0-9_*]+_test\\.go)`").FindAllStringSubmatch(string(text), -1) {
		patterns = append(patterns, name[1])
	}
	files, err := filepath.Glob("../e2e/*_test.go")
	require.NoError(t, err)
	require.NotEmpty(t, files)
	for _, file := range files {
		code, err := os.ReadFile(file)
		require.NoError(t, err)
		if !strings.Contains(strings.ReplaceAll(string(code), "func TestMain(", ""), "\nfunc Test") {
			continue
		}
		require.True(t, slices.ContainsFunc(patterns, func(p string) bool {
			ok, err := filepath.Match(p, filepath.Base(file))
			return err == nil && ok
		}), "e2e/README.md does not have %s", filepath.Base(file))
	}
}
