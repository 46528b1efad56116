// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package docs

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// unlisted are messages that need no row in the table of operations.md, each with
// the reason.
var unlisted = map[string]string{}

// notLogs are packages and values whose methods Error and Warn write no log.
var notLogs = []string{"assert", "errors", "fmt", "require", "status", "t"}

// source is a package's code, as far as logging is concerned.
type source struct {
	fset  *token.FileSet
	files []*ast.File
}

// sources are the packages below dirs that are part of containerd or of the shim.
func sources(t *testing.T, dirs ...string) map[string]*source {
	t.Helper()
	all := map[string]*source{}
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if d.IsDir() && slices.Contains([]string{"vmmtest", "attack", "testdata"}, d.Name()) {
				return fs.SkipDir // tests' own
			}
			if filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") || strings.HasSuffix(path, ".pb.go") {
				return nil
			}
			s := all[filepath.Dir(path)]
			if s == nil {
				s = &source{fset: token.NewFileSet()}
				all[filepath.Dir(path)] = s
			}
			f, err := parser.ParseFile(s.fset, path, nil, parser.SkipObjectResolution)
			s.files = append(s.files, f)
			return err
		})
		require.NoError(t, err)
	}
	require.Greater(t, len(all), 10)
	return all
}

// root is the name at the beginning of a chain of calls and fields.
func root(e ast.Expr) string {
	for {
		switch x := e.(type) {
		case *ast.CallExpr:
			e = x.Fun
		case *ast.SelectorExpr:
			e = x.X
		case *ast.Ident:
			return x.Name
		default:
			return ""
		}
	}
}

// logged calls f with each message of level warning or error, and its level. What is
// no constant is what callers of the function around it give.
func (s *source) logged(t *testing.T, f func(level, message string)) {
	t.Helper()
	for _, file := range s.files {
		for _, decl := range file.Decls {
			ast.Inspect(decl, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok || len(call.Args) == 0 {
					return true
				}
				sel, ok := call.Fun.(*ast.SelectorExpr)
				if !ok || slices.Contains(notLogs, root(sel.X)) {
					return true
				}
				level := map[string]string{
					"Warn": "warning", "Warnf": "warning", "Warning": "warning", "Warningf": "warning", "Error": "error", "Errorf": "error",
				}[sel.Sel.Name]
				if level == "" {
					return true
				}
				texts := s.texts(decl, call.Args[0])
				require.NotEmpty(t, texts, "%s: the message is no constant that can be found", s.fset.Position(call.Pos()))
				for _, text := range texts {
					f(level, text)
				}
				return true
			})
		}
	}
}

// texts are the values that an argument may have in decl: a literal, a constant, or
// what callers give a parameter.
func (s *source) texts(decl ast.Decl, arg ast.Expr) []string {
	if text, ok := literal(arg); ok {
		return []string{text}
	}
	name, ok := arg.(*ast.Ident)
	if !ok {
		return nil
	}
	if text, ok := s.constant(name.Name); ok {
		return []string{text}
	}
	fn, ok := decl.(*ast.FuncDecl)
	if !ok {
		return nil
	}
	i := 0
	for _, field := range fn.Type.Params.List {
		for _, param := range field.Names {
			if param.Name == name.Name {
				return s.given(fn.Name.Name, i)
			}
			i++
		}
	}
	return nil
}

func literal(e ast.Expr) (string, bool) {
	lit, ok := e.(*ast.BasicLit)
	if !ok || lit.Kind != token.STRING {
		return "", false
	}
	text, err := strconv.Unquote(lit.Value)
	return text, err == nil
}

// constant is a string constant of the package, also one of a function's own.
func (s *source) constant(name string) (text string, found bool) {
	for _, file := range s.files {
		ast.Inspect(file, func(n ast.Node) bool {
			spec, ok := n.(*ast.ValueSpec)
			if !ok {
				return true
			}
			for i, id := range spec.Names {
				if id.Name == name && i < len(spec.Values) {
					if value, ok := literal(spec.Values[i]); ok {
						text, found = value, true
					}
				}
			}
			return true
		})
	}
	return text, found
}

// given are the literals with which the function is called as its i-th argument. One
// that is no literal is an empty text, which is in no table.
func (s *source) given(function string, i int) (texts []string) {
	for _, file := range s.files {
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || len(call.Args) <= i {
				return true
			}
			if sel, ok := call.Fun.(*ast.SelectorExpr); ok && sel.Sel.Name == function {
				text, _ := literal(call.Args[i])
				texts = append(texts, text)
			}
			return true
		})
	}
	return texts
}

// TestLogMessages: each message of level warning or error is in the table with its
// level, and the table has no other.
func TestLogMessages(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("operations.md")
	require.NoError(t, err)
	documented := map[string]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| (warning|error) \\| `([^`]+)` \\|").FindAllStringSubmatch(string(text), -1) {
		require.NotContains(t, documented, row[1]+": "+row[2], "it has two rows")
		documented[row[1]+": "+row[2]] = ""
	}
	written := map[string]string{}
	for _, s := range sources(t, "../controller", "../vmpool", "../plugin", "../containerd-build") {
		s.logged(t, func(level, message string) {
			if unlisted[message] == "" {
				written[level+": "+message] = ""
			}
		})
	}
	require.Greater(t, len(written), 50)
	require.Equal(t, written, documented)
}

// TestLoggedFindsAll: messages are found however they are given.
func TestLoggedFindsAll(t *testing.T) {
	t.Parallel()
	fset := token.NewFileSet()
	f, err := parser.ParseFile(fset, "x.go", `package x
func a() { log.G(ctx).WithError(err).Warn("one"); err.Error(); status.Error(codes.OK, "no"); t.Error("no") }
func b() { const text = "two"; l.Errorf(text, 1) }
func (x *T) tell(err error, what string) { log.L.Warn(what) }
func c() { x.tell(nil, "three"); x.tell(nil, "four") }
`, parser.SkipObjectResolution)
	require.NoError(t, err)
	var got []string
	(&source{fset: fset, files: []*ast.File{f}}).logged(t, func(level, message string) {
		got = append(got, fmt.Sprint(level, " ", message))
	})
	require.Equal(t, []string{"warning one", "error two", "warning three", "warning four"}, got)
}

// TestOperationsMetrics: a metric that the operator is to look at exists.
func TestOperationsMetrics(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("operations.md")
	require.NoError(t, err)
	all := registered(t)
	names := regexp.MustCompile(`containerd_cloudhv_[a-z_]+`).FindAllString(string(text), -1)
	require.NotEmpty(t, names)
	for _, name := range names {
		require.Contains(t, all, name)
	}
}

// TestOperationsCommands: a command that the text names is one of those that the
// document shows, and e2e runs.
func TestOperationsCommands(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("operations.md")
	require.NoError(t, err)
	var shown, prose strings.Builder
	for i, part := range strings.Split(string(text), "```") {
		if i%2 == 1 {
			shown.WriteString(part)
		} else {
			prose.WriteString(part)
		}
	}
	named := regexp.MustCompile("`((?:cat|cloudhvctl|crictl|ctr|df|du|find|ip|journalctl|kill|ls|ps|rm|systemctl) [^`]+)`")
	all := named.FindAllStringSubmatch(prose.String(), -1)
	require.NotEmpty(t, all)
	for _, m := range all {
		require.Contains(t, shown.String(), m[1])
	}
}
