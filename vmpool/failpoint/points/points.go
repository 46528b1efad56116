// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package points reads which failpoints there are from the source, for tests: a list that
// is read from there has every one.
package points

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/containerd/errdefs"

	"github.com/cloudhv/containerd-cloudhv/vmpool/failpoint"
)

// Declared is a point as points.go of package failpoint declares it.
type Declared struct {
	failpoint.Point
	// Name is that of its constant.
	Name string
}

// All lists the points in the order of their names. Repo is the root of the checkout.
func All(repo string) ([]Declared, error) {
	path := filepath.Join(repo, "vmpool", "failpoint", "points.go")
	file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
	if err != nil {
		return nil, fmt.Errorf("list failpoints: %w", err)
	}
	var all []Declared
	for _, decl := range file.Decls {
		gen, ok := decl.(*ast.GenDecl)
		if !ok || gen.Tok != token.CONST {
			continue
		}
		for _, spec := range gen.Specs {
			d, err := declared(spec.(*ast.ValueSpec))
			if err != nil {
				return nil, err
			}
			all = append(all, d)
		}
	}
	slices.SortFunc(all, func(a, b Declared) int { return cmp.Compare(a.Point, b.Point) })
	return all, nil
}

func declared(spec *ast.ValueSpec) (Declared, error) {
	name := spec.Names[0].Name
	if len(spec.Names) == 1 && len(spec.Values) == 1 {
		if lit, ok := spec.Values[0].(*ast.BasicLit); ok {
			if text, err := strconv.Unquote(lit.Value); err == nil {
				return Declared{Point: failpoint.Point(text), Name: name}, nil
			}
		}
	}
	return Declared{}, fmt.Errorf("failpoint %s is not declared as one string constant: %w", name, errdefs.ErrInvalidArgument)
}
