// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package compat

import (
	"flag"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudhv/containerd-cloudhv/docs/testnames"
)

var update = flag.Bool("update", false, "write docs/compatibility.md anew")

// fieldsOf are the fields of a message and of those within, as the CRI names them.
func fieldsOf(typ reflect.Type, seen map[reflect.Type]bool) []string {
	if seen[typ] || strings.HasPrefix(typ.Name(), "Windows") {
		return nil
	}
	seen[typ] = true
	var out []string
	for f := range typ.Fields() {
		_, name, ok := strings.Cut(f.Tag.Get("protobuf"), ",name=")
		if !ok {
			continue
		}
		name, _, _ = strings.Cut(name, ",")
		out = append(out, typ.Name()+"."+name)
		elem := f.Type
		for elem.Kind() == reflect.Pointer || elem.Kind() == reflect.Slice || elem.Kind() == reflect.Map {
			elem = elem.Elem()
		}
		if elem.Kind() == reflect.Struct {
			out = append(out, fieldsOf(elem, seen)...)
		}
	}
	return out
}

// TestEveryFieldAndCall compares the list with the CRI.
func TestEveryFieldAndCall(t *testing.T) {
	t.Parallel()
	seen := map[reflect.Type]bool{}
	want := append(fieldsOf(reflect.TypeFor[runtimeapi.PodSandboxConfig](), seen), fieldsOf(reflect.TypeFor[runtimeapi.ContainerConfig](), seen)...)
	for m := range reflect.TypeFor[runtimeapi.RuntimeServiceServer]().Methods() {
		if m.IsExported() {
			want = append(want, m.Name)
		}
	}
	var got []string
	for _, s := range []Section{podFields, containerFields, calls} {
		for _, e := range s.Entries {
			got = append(got, e.Name)
		}
	}
	require.ElementsMatch(t, want, got)
}

// TestTestsAreThere: what an entry names as its proof is a test, and a feature that works
// or is refused for good has one.
func TestTestsAreThere(t *testing.T) {
	t.Parallel()
	tests := testnames.Checker{Root: "../.."}
	for _, s := range Sections() {
		names := map[string]bool{}
		for _, e := range s.Entries {
			assert.False(t, names[e.Name], "%s is there twice", e.Name)
			names[e.Name] = true
			if s.Title == features.Title && slices.Contains([]Fate{Works, InVM, Partly, Refused}, e.Fate) {
				assert.NotEmpty(t, e.Tests, "%s: nothing proves it", e.Name)
			}
			assert.NotContains(t, e.Name+e.What, "|", "it would end the table's cell")
			for _, test := range e.Tests {
				assert.NoError(t, tests.Check(test), e.Name)
			}
		}
	}
}

// TestDocument: the document is what the list says.
func TestDocument(t *testing.T) {
	t.Parallel()
	const file = "../compatibility.md"
	if *update {
		require.NoError(t, os.WriteFile(file, []byte(Markdown()), 0o644))
	}
	b, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, Markdown(), string(b), "go test ./docs/compat -update writes it anew")
}
