// SPDX-License-Identifier: Apache-2.0
// Copyright The containerd-cloudhv Authors

// Package testnames finds the tests that documents name.
package testnames

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// defaultDir is where tests are whose directory is not said.
const defaultDir = "e2e"

var testFunc = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`)

// Checker knows the tests of a checkout. Its methods may not be called at once.
type Checker struct {
	// Root is the checkout's.
	Root string

	known map[string][]string
}

// Check returns an error unless there is a test of that name: NAME in e2e, or DIRECTORY:NAME. A
// name that ends with * is that of any test that begins so.
func (c *Checker) Check(ref string) error {
	dir, name, ok := strings.Cut(ref, ":")
	if !ok {
		dir, name = defaultDir, ref
	}
	names, err := c.in(dir)
	if err != nil {
		return err
	}
	prefix, isPrefix := strings.CutSuffix(name, "*")
	for _, n := range names {
		if n == name || isPrefix && strings.HasPrefix(n, prefix) {
			return nil
		}
	}
	return fmt.Errorf("%s is no test of %s", name, dir)
}

// in are the tests of a directory.
func (c *Checker) in(dir string) ([]string, error) {
	if names, ok := c.known[dir]; ok {
		return names, nil
	}
	files, err := filepath.Glob(filepath.Join(c.Root, dir, "*_test.go"))
	if err != nil {
		return nil, err
	}
	var names []string
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		for _, m := range testFunc.FindAllStringSubmatch(string(text), -1) {
			names = append(names, m[1])
		}
	}
	if c.known == nil {
		c.known = map[string][]string{}
	}
	c.known[dir] = names
	return names, nil
}
