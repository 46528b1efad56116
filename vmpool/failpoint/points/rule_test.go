// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

package points

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
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

const repo = "../../.."

// rooms are the packages whose functions do what verbs do, in which TestEffects looks.
var rooms = []string{
	"controller", "controller/network", "controller/rootfs", "controller/shim", "vmpool", "vmpool/snapshot",
	"vmpool/vmm/vmproc",
}

// users are where points may be. What a driver does to a VM that runs is behind the calls of
// its contract, each of which has a point before it.
var users = append([]string{"vmpool/qemu", "vmpool/cloudhypervisor"}, rooms...)

// effects are the calls that change something outside of the process, by the name of
// the function or method, with the package or what is left of the dot; "" is anything.
var effects = map[string]string{
	"os.Mkdir": "", "os.MkdirAll": "", "os.MkdirTemp": "", "os.CreateTemp": "", "os.WriteFile": "", "os.Remove": "",
	"os.RemoveAll": "", "os.Rename": "", "os.Symlink": "", "os.Chown": "", "os.Chmod": "", "os.Truncate": "",
	"sparse.CopyFile": "", "durable.WriteJSON": "", "mount.All": "", "unix.Mount": "", "unix.Unmount": "",
	"confine.Start": "", "cmd.Start": "", "cmd.Run": "",
	// The contract of drivers, the network, guests and the host service.
	".Boot": "", ".Restore": "", ".Attach": "", ".Pause": "", ".Resume": "", ".AddNIC": "", ".AddDisk": "", ".RemoveDisk": "",
	".SetCgroup": "", ".Kill": "", "vm.Resize": "", "v.Snapshot": "", "vm.Snapshot": "", "v.Disconnect": "",
	".MakeTAP": "", "network.Join": "", "network.Listen": "", ".Clear": "", ".Disconnect": "",
	"callGuest": "", "callTasks": "", ".askHost": "",
	".LinkAdd": "", "createTAP": "", "putInto": "", "group.Add": "", "cgroup.Add": "", "cgroup.Make": "", "cgroup.Limit": "",
}

// function is one of the code's.
type function struct {
	name    string
	effects []string
	points  []string
}

// functions lists those of a package that are compiled, as "dir/file: name".
func functions(t *testing.T, dir string) []function {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(repo, dir, "*.go"))
	require.NoError(t, err)
	require.NotEmpty(t, files, dir)
	var list []function
	for _, path := range files {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		require.NoError(t, err)
		for _, decl := range file.Decls {
			if d, ok := decl.(*ast.FuncDecl); ok && d.Body != nil {
				list = append(list, look(d, dir+"/"+filepath.Base(path)))
			}
		}
	}
	return list
}

// look reads a function.
func look(d *ast.FuncDecl, file string) function {
	f := function{name: file + " " + d.Name.Name}
	ast.Inspect(d.Body, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.SelectorExpr:
			if x, ok := n.X.(*ast.Ident); ok && x.Name == "failpoint" && ast.IsExported(n.Sel.Name) && n.Sel.Name != "At" && n.Sel.Name != "Env" && n.Sel.Name != "Point" {
				f.points = append(f.points, n.Sel.Name)
			}
		case *ast.CallExpr:
			if e := effectOf(n); e != "" {
				f.effects = append(f.effects, e)
			}
		}
		return true
	})
	return f
}

// effectOf is the effect that a call has, or "".
func effectOf(call *ast.CallExpr) string {
	fun := call.Fun
	if i, ok := fun.(*ast.IndexExpr); ok {
		fun = i.X
	}
	var names []string
	switch fun := fun.(type) {
	case *ast.Ident:
		names = []string{fun.Name}
	case *ast.SelectorExpr:
		names = []string{"." + fun.Sel.Name}
		switch x := fun.X.(type) {
		case *ast.Ident:
			names = append(names, x.Name+"."+fun.Sel.Name)
		case *ast.SelectorExpr:
			names = append(names, x.Sel.Name+"."+fun.Sel.Name)
		}
	}
	for _, name := range names {
		if _, ok := effects[name]; ok {
			return name
		}
	}
	return ""
}

// TestPoints looks whether each point has a name as it should be and stands where it is
// declared to: at one place of each package that has it.
func TestPoints(t *testing.T) {
	all, err := All(repo)
	require.NoError(t, err)
	require.NotEmpty(t, all)
	form := regexp.MustCompile(`^[a-z]+(-[a-z]+)*/[a-z]+(-[a-z]+)*$`)
	used := map[string]map[string]int{}
	for _, dir := range users {
		for _, f := range functions(t, dir) {
			for _, p := range f.points {
				if used[p] == nil {
					used[p] = map[string]int{}
				}
				used[p][dir]++
			}
		}
	}
	seen := map[string]string{}
	for _, p := range all {
		assert.Regexp(t, form, p.Point)
		assert.Empty(t, seen[string(p.Point)], "%s and another are both %s", p.Name, p.Point)
		seen[string(p.Point)] = p.Name
		assert.NotEmpty(t, used[p.Name], "%s is declared, and stands nowhere", p.Name)
		for dir, n := range used[p.Name] {
			assert.Equal(t, 1, n, "places of %s in %s", p.Name, dir)
		}
	}
}

// TestEffects looks whether each function with a side effect has a point, or a reason for
// having none. A new one that has neither fails here.
func TestEffects(t *testing.T) {
	without := map[string]bool{}
	for _, dir := range rooms {
		for _, f := range functions(t, dir) {
			if len(f.effects) > 0 && len(f.points) == 0 {
				without[f.name] = true
				if exempt[f.name] == "" {
					t.Errorf("%s calls %s without a failpoint before: declare one in vmpool/failpoint/points.go, and give e2e/faults a scenario that comes to it",
						f.name, strings.Join(f.effects, ", "))
				}
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(exempt)) {
		assert.True(t, without[name], "%s needs no exemption any more", name)
	}
}

// TestCompiledOut looks whether builds for nodes have no points: whoever imports the package
// gets a function that returns nil.
func TestCompiledOut(t *testing.T) {
	data, err := os.ReadFile(filepath.Join(repo, "vmpool", "failpoint", "off.go"))
	require.NoError(t, err)
	for _, want := range []string{"//go:build !failpoints", "func At(context.Context, Point) error { return nil }", "const Enabled = false"} {
		assert.Contains(t, string(data), want)
	}
	for _, file := range []string{"failpoint.go", "points.go", "off.go"} {
		parsed, err := parser.ParseFile(token.NewFileSet(), filepath.Join(repo, "vmpool", "failpoint", file), nil, parser.ImportsOnly)
		require.NoError(t, err)
		for _, i := range parsed.Imports {
			assert.Contains(t, []string{`"context"`, `"errors"`, `"strings"`}, i.Path.Value, fmt.Sprintf("%s has nothing that could look for a point", file))
		}
	}
}
